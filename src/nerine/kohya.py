"""`--network_module nerine.kohya`: the door for sd-scripts. See `nerine.integrations.kohya`."""

from nerine.integrations.kohya import KohyaNetwork, create_network, create_network_from_weights

__all__ = ["KohyaNetwork", "create_network", "create_network_from_weights"]
