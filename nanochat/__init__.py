"""The library behind the pipeline: one idea a file, driven by the modules in scripts/."""
