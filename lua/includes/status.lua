-- First number of each check's answer; core.admission.program names the same.
local ADMIT, REJECT, COLD, STALE, LATE, BROKEN, UNVERIFIED, DUPLICATE = 0, 1, 2, 3, 4, 5, 6, 7
-- Flags of each limit's answer.
local REFUSED, OVERAGE, WARNED = 1, 2, 4
