"""What is not the algorithm: command line, datasets, evaluation, runs. See README.md."""
