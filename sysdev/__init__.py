"""sysdev: what is no disk and no network: event channels, grants and hypercalls of programs (dev/xen)."""
