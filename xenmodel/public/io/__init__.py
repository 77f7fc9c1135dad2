"""Device protocols, file for file after xen/include/public/io."""
