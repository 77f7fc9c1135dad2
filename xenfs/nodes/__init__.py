"""What the tree under the mount is made of."""
