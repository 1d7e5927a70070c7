"""mambair_ds: train MambaIRv2 image restoration with DeepSpeed, DALI and Triton.

Pictures become shards (`prepare`), shards become batches on the accelerator (`data`), a DeepSpeed engine turns batches
into weights (`training`), and weights restore pictures (`inference`).
"""

__version__ = "0.1.0"
