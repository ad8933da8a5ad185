"""`python -m fasp_graph` and `torchrun -m fasp_graph` are the command line."""

from fasp_graph_entry import main

main()
