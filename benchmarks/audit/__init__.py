"""How well the audit tells backdoored classifiers from clean ones, beside other methods, and how well its repair works."""
