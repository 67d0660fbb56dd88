-- First number of each check's answer; core.admission.program names the same.
local ADMIT, REJECT, COLD, STALE, LATE, BROKEN = 0, 1, 2, 3, 4, 5
-- Flags of each limit's answer.
local REFUSED, OVERAGE, WARNED = 1, 2, 4
