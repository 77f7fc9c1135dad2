"""netdev: the vif device of Xen (netif.h): netfront, netback, their rings, and the interfaces behind them."""
