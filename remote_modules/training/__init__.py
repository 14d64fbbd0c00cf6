"""What the usual training loops log of a swarm: callbacks for Lightning and for transformers' `Trainer`.

Each is in a module of its own, so that only the library that is used gets imported; `remote_modules` exports both.
"""
