"""The table of docs/layout_agreement.md: at every layout a run gives the losses, gradients and weights of one process.

In float64, so that a difference is a mistake and not the order of a sum.  `SOV_WRITE_TABLE=1` renews the page.
"""
