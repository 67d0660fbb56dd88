"""Who may call: creators, customers, subscriptions and API keys, in Postgres.

Plain async functions over `core.db.Database`, used by the CLI, the control process and the
gateway's key loader. May import `core.db`, `core.secrets`, `core.policy` and the small modules of
`core`. All raise `NotFoundError` for an unknown identifier, `InvalidValueError` naming the field
and the fix, and `StoreUnavailableError` when Postgres does not answer. Lists come in pages: up to
`limit` rows with identifiers after `after`, oldest first.
"""

from core.directory.accounts import (
    Creator,
    Customer,
    create_creator,
    create_customer,
    get_creator,
    get_customer,
    list_creators,
    list_customers,
)
from core.directory.keys import (
    UNCHANGED,
    ApiKey,
    NewKey,
    Unchanged,
    create_key,
    get_key,
    list_keys,
    revoke_key,
    touch_keys,
    update_key,
)
from core.directory.lookup import KeyRow, SubscriptionRow, lookup_keys, lookup_subscriptions
from core.directory.subscriptions import (
    Subscription,
    create_subscription,
    get_subscription,
    list_subscriptions,
    set_anchor,
    set_plan,
    set_status,
)

__all__ = [
    "UNCHANGED",
    "ApiKey",
    "Creator",
    "Customer",
    "KeyRow",
    "NewKey",
    "Subscription",
    "SubscriptionRow",
    "Unchanged",
    "create_creator",
    "create_customer",
    "create_key",
    "create_subscription",
    "get_creator",
    "get_customer",
    "get_key",
    "get_subscription",
    "list_creators",
    "list_customers",
    "list_keys",
    "list_subscriptions",
    "lookup_keys",
    "lookup_subscriptions",
    "revoke_key",
    "set_anchor",
    "set_plan",
    "set_status",
    "touch_keys",
    "update_key",
]
