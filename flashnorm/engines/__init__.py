"""flashnorm in the engines that people run: loaders, plugins and entry points, a file each."""
