"""docker-compose.yml and the image on a real container engine: the host's, or Debian's in a folder of its own."""

import bench.soak  # noqa: F401 - the tests' support, which this uses too, can be imported after it
