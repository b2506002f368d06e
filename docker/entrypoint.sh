#!/bin/sh
# `docker run automerge ARGUMENTS` runs the command `automerge`. What begins with a shell, an interpreter, a path or the
# command itself runs as it is: so do the commands of Kubeflow Pipelines where they do not replace the entry point.
case "${1:-}" in
  sh | bash | python | python3 | automerge | /*) exec "$@" ;;
  *) exec automerge "$@" ;;
esac
