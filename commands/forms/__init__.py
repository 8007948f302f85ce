"""Commands as forms: fields of their parameters, and the command line that they make."""
