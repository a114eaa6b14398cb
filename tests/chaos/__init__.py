"""Faults in a suite of processes while sessions stream: a session may lose time, but no frame.

The suite has two workers for each stage and two gateways. Each session's frames are counted and compared, and at the
end no stream, key or process may remain. `test_chaos` injects each kind of fault once; `python -m tests.chaos` injects
random ones for as long as requested.

    client -> gateway -> Proxy -> worker
"""
