//! Guest rings and NIC, polled: frames, worker, release.
