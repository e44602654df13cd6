"""The border: HTTP, the page and the command line, each one estimator call and back."""
