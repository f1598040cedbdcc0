"""The stages of the pipeline, each run as `python -m scripts.<stage>` or under torchrun."""
