"""What a run leaves and says: events, manifests, sidecars, the layout of its folder."""
