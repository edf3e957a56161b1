//! The system calls that no safe wrapper covers, each in the smallest function.

use std::io;

/// What the kernel says of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KernelClock {
    /// Something keeps it in step.
    pub(super) is_synchronised: bool,
    /// By how much it may be wrong, microseconds.
    pub(super) error_max_us: i64,
}

/// Asks, changing nothing (adjtimex(2) with no modes).
#[allow(unsafe_code)]
pub(super) fn kernel_clock() -> io::Result<KernelClock> {
    // SAFETY: `timex` is plain integers, for which zeroes are a value; `modes` 0 only reads.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live `timex` of ours.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(KernelClock {
        is_synchronised: state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0,
        error_max_us: timex.maxerror,
    })
}
