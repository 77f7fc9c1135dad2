"""The Xen ABI, file for file after xen/include/public: numbers, byte layouts and node names."""
