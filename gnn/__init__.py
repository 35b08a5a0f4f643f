"""Graph neural networks from scratch: node, link, graph and community tasks, from 34 nodes to 10^8 edges."""
