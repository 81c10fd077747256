"""What runs inside the server, copied as it is into model repositories: the scorer stage (NumPy only), and around it a guard in one
process, which needs ONNX Runtime as well."""
