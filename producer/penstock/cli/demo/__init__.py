"""`penstock demo`: the whole house at work, one worker killed mid-stream, and the proof that nothing was lost."""
