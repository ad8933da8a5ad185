"""The compiler. Tensors and graphs in, frozen values out; it knows no files, terminals or users.

    capture -> couple -> observe -> score -> select -> restore -> rewrite -> verify

Every index of every dim of every weight is a label. Running the captured graph on labels unites
those that must be
removed together (labels, couple). For a consumer Y = X W^T + b with kept columns K and removed
columns P:

    score     FASP: S_j = sum_i |W_ij| ||X_j||_2; the least go, equally many in each block
    restore   W_K* = argmin ||X W^T - X_K W_K*^T||^2 + d ||W_K* - W_K||^2
    verify    compact(x) = dense(x) with 1_K applied wherever a removed label is summed away

Each verb is one file; verbs never call each other, the driver does (fasp_graph/prune.py).
"""
