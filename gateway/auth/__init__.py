"""Who is calling: the API key of a request, and the subscription behind it.

`extract` finds the key, `keycache` holds what is known of keys in this process, `keyloader` asks
Postgres for the rest and keeps the cache true by LISTEN, `authenticator` puts them together. May
import `core`; nothing else of `gateway`.

A request whose key is cached costs no I/O. What bounds how long a change takes to bite:
- Postgres and the LISTEN connection up: a notification, well under a second;
- LISTEN connection lost: all cached keys are looked up again as soon as it is back; a key in use
  is looked up every `ttl` besides;
- Postgres down: cached keys keep working as they were, others answer "unavailable" (503).
"""

from gateway.auth.authenticator import Authentication, Authenticator, Outcome
from gateway.auth.extract import KeyExtractor, Source
from gateway.auth.keycache import KeyCache, KeyEntry, Subscription
from gateway.auth.keyloader import KeyLoader

__all__ = [
    "Authentication",
    "Authenticator",
    "KeyCache",
    "KeyEntry",
    "KeyExtractor",
    "KeyLoader",
    "Outcome",
    "Source",
    "Subscription",
]
