"""What only fully virtualised guests see, file for file after xen/include/public/hvm."""
