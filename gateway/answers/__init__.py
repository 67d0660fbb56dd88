"""What the gateway says about a decision, apart from the upstream's own response.

  verdict.py   what the limiter reports about one limit
  headers.py   RateLimit-Policy, RateLimit, the legacy and the vendor headers, Retry-After
  problems.py  RFC 9457 bodies of everything the gateway refuses or cannot do

Pure functions of their arguments. May import `core.policy` and orjson; nothing else of the gateway.
"""
