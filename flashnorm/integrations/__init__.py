"""The interfaces of other libraries that flashnorm plugs into, one file each."""
