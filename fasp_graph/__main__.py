"""`python -m fasp_graph` and `torchrun -m fasp_graph` are the command line."""

from .cli import main

main()
