"""Diphase serves large language models with prefill and decode in separate worker pools."""

from os import environ as _environ

# gRPC's core tells stderr of every connection that ends; what matters comes as an error. Here, since it reads
# this when it is first imported, and whatever of Diphase imports it has come by here before.
_environ.setdefault("GRPC_VERBOSITY", "NONE")
