"""What a secure deployment needs before its first start: certificates, keys of the nodes, configuration, scripts."""
