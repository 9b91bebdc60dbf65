"""One file per family of architectures: the specification of a module that it knows."""
