-- First number of each check's answer; core.admission.program names the same.
local ADMIT, REJECT, COLD, STALE = 0, 1, 2, 3
-- Flags of each limit's answer.
local REFUSED, OVERAGE, WARNED = 1, 2, 4
