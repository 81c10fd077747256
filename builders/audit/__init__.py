"""Does the classifier itself carry a backdoor, and how to take it out (BAN: Xu et al., NeurIPS 2024, arXiv 2405.19928)."""
