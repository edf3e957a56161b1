//! The probe from outside: an ICMP echo every millisecond from the client's
//! namespace, and the longest silence between two answers.

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use rustix::time::{ClockId, Timespec, clock_gettime};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// One echo request each.
const PERIOD_NS: u64 = 1_000_000;

/// Answers kept: eight hours at one a millisecond would be 230 MB; a probe is
/// stopped long before. The oldest half goes when it is full.
const ANSWERS_MAX: usize = 2_000_000;

/// A moment on this machine's monotonic clock, in nanoseconds.
pub type MonotonicNs = u64;

/// Now, on the clock of every time in this module.
pub fn now_ns() -> MonotonicNs {
    let now = clock_gettime(ClockId::Monotonic);
    ns(now)
}

fn ns(time: Timespec) -> u64 {
    // The monotonic clock starts near 0 and is never negative.
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Enters a network namespace with the calling thread, for good.
///
/// # Errors
/// When it does not exist or we may not.
pub fn enter_netns(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open the network namespace {}", path.display()))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter the network namespace {}", path.display()))
}

/// A silence: from the last answer before it to the first one after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// When the last answer before came.
    pub from_ns: MonotonicNs,
    /// When the next answer came.
    pub to_ns: MonotonicNs,
}

impl Gap {
    /// Its length in milliseconds.
    pub fn ms(&self) -> f64 {
        (self.to_ns - self.from_ns) as f64 / 1e6
    }
}

/// A running probe. Dropping it stops it.
#[derive(Debug)]
pub struct Probe {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    sent: AtomicU64,
    /// Arrival times, growing.
    answers: Mutex<Vec<MonotonicNs>>,
}

impl Probe {
    /// Starts to ping `target` from the network namespace at `netns`.
    ///
    /// # Errors
    /// When the namespace cannot be entered or raw sockets are refused.
    pub fn start(netns: &Path, target: Ipv4Addr) -> Result<Probe> {
        let socket = Arc::new(socket_in(netns)?);
        let shared = Arc::new(Shared::default());
        let ident = (std::process::id() as u16) ^ (now_ns() as u16);
        let receiver = {
            let (socket, shared) = (socket.clone(), shared.clone());
            spawn("probe-receive", move || receive(&socket, &shared, target, ident))?
        };
        let sender = {
            let shared = shared.clone();
            spawn("probe-send", move || send(&socket, &shared, target, ident))?
        };
        Ok(Probe {
            shared,
            threads: vec![receiver, sender],
        })
    }

    /// Waits until the target answers.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub fn wait_answer(&self, limit: Duration) -> Result<MonotonicNs> {
        let end = now_ns() + u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX / 2);
        let from = now_ns();
        loop {
            let answers = self.answers();
            if let Some(first) = answers.iter().find(|at| **at >= from) {
                return Ok(*first);
            }
            if now_ns() > end {
                bail!("no answer to a ping within {} s", limit.as_secs());
            }
            // Polls what the receiver has; a millisecond is the probe's own grain.
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Requests sent so far.
    pub fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::Relaxed)
    }

    /// Longest silence that touches `[from, to]`. A silence that has not ended
    /// by `to` counts up to `to`.
    pub fn longest_gap(&self, from: MonotonicNs, to: MonotonicNs) -> Gap {
        longest_gap(&self.answers(), from, to)
    }

    /// Arrival of the first answer after `at`, if there is one yet.
    pub fn first_answer_after(&self, at: MonotonicNs) -> Option<MonotonicNs> {
        self.answers().iter().copied().find(|answer| *answer > at)
    }

    fn answers(&self) -> std::sync::MutexGuard<'_, Vec<MonotonicNs>> {
        match self.shared.answers.lock() {
            Ok(answers) => answers,
            // A list of times is whole whatever its writer died of.
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// See [`Probe::longest_gap`]; `answers` must be sorted.
fn longest_gap(answers: &[MonotonicNs], from: MonotonicNs, to: MonotonicNs) -> Gap {
    let first = answers.partition_point(|at| *at < from);
    let start = answers[..first].last().copied().unwrap_or(from);
    let mut longest = Gap::default();
    let mut last = start;
    for &at in &answers[first..] {
        if last >= to {
            break;
        }
        let gap = Gap {
            from_ns: last,
            to_ns: at,
        };
        if gap.to_ns - gap.from_ns > longest.to_ns - longest.from_ns {
            longest = gap;
        }
        last = at;
    }
    if last < to && to - last > longest.to_ns - longest.from_ns {
        longest = Gap {
            from_ns: last,
            to_ns: to,
        };
    }
    longest
}

/// A raw ICMP socket of that namespace: a socket stays where it was born.
fn socket_in(netns: &Path) -> Result<Socket> {
    let netns = netns.to_owned();
    let made = thread::spawn(move || -> Result<Socket> {
        enter_netns(&netns)?;
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))
            .context("cannot open a raw socket for the probe (root is needed)")?;
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .context("cannot set the probe's timeout")?;
        socket
            .set_recv_buffer_size(4 << 20)
            .context("cannot size the probe's buffer")?;
        Ok(socket)
    });
    match made.join() {
        Ok(socket) => socket,
        Err(_) => bail!("the probe's thread panicked"),
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            real_time();
            body();
        })
        .context("cannot start the probe")
}

/// Asks for SCHED_FIFO at the lowest real-time priority for this thread: the
/// probe and the load stand for another machine, so guests that fill all cores
/// must not show up as silence of the guest. Without it they still work.
#[allow(unsafe_code)]
pub(crate) fn real_time() {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: pid 0 is the calling thread; the pointer is to a live local.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters);
    }
}

fn send(socket: &Socket, shared: &Shared, target: Ipv4Addr, ident: u16) {
    let to = SocketAddrV4::new(target, 0).into();
    let mut next = now_ns();
    while !shared.stop.load(Ordering::Relaxed) {
        let sent = shared.sent.fetch_add(1, Ordering::Relaxed);
        // Unreachable or no buffer: an echo that got no answer, which shows.
        let _ = socket.send_to(&echo_request(ident, sent as u16), &to);
        next += PERIOD_NS;
        let now = now_ns();
        if next > now {
            thread::sleep(Duration::from_nanos(next - now));
        } else if now - next > 100 * PERIOD_NS {
            // We were not run ourselves for so long: do not send a burst after it.
            next = now;
        }
    }
}

fn receive(mut socket: &Socket, shared: &Shared, target: Ipv4Addr, ident: u16) {
    let mut packet = [0_u8; 256];
    while !shared.stop.load(Ordering::Relaxed) {
        // Timeouts let us look at `stop`.
        let Ok(length) = socket.read(&mut packet) else {
            continue;
        };
        let now = now_ns();
        if is_echo_reply(&packet[..length], target, ident)
            && let Ok(mut answers) = shared.answers.lock()
        {
            if answers.len() >= ANSWERS_MAX {
                answers.drain(..ANSWERS_MAX / 2);
            }
            answers.push(now);
        }
    }
}

/// RFC 792 echo request with 8 bytes of payload.
fn echo_request(ident: u16, sequence: u16) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[0] = 8;
    packet[4..6].copy_from_slice(&ident.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    packet[8..].copy_from_slice(b"godwit\0\0");
    let mut sum: u32 = packet
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet
}

/// An IPv4 packet from `target` with an ICMP echo reply to `ident`.
fn is_echo_reply(packet: &[u8], target: Ipv4Addr, ident: u16) -> bool {
    let Some(first) = packet.first() else {
        return false;
    };
    let header = usize::from(first & 0x0f) * 4;
    packet.get(12..16) == Some(&target.octets())
        && packet.get(header) == Some(&0)
        && packet.get(header + 4..header + 6) == Some(&ident.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn the_longest_gap_may_begin_before_the_window_and_end_after_it() {
        let answers: Vec<u64> = [10, 11, 12, 40, 41, 60].iter().map(|ms| ms * MS).collect();
        let gap = longest_gap(&answers, 13 * MS, 20 * MS);
        assert_eq!((gap.from_ns, gap.to_ns), (12 * MS, 40 * MS));
        assert_eq!(gap.ms(), 28.0);
        let calm = longest_gap(&answers, 10 * MS, 12 * MS);
        assert_eq!(calm.ms(), 1.0);
    }

    #[test]
    fn a_guest_that_never_answers_again_has_a_gap_to_the_end() {
        let answers = [10 * MS, 11 * MS];
        assert_eq!(longest_gap(&answers, 10 * MS, 500 * MS).ms(), 489.0);
        assert_eq!(longest_gap(&[], 10 * MS, 500 * MS).ms(), 490.0);
    }

    #[test]
    fn an_echo_request_has_a_right_checksum() {
        let packet = echo_request(0x1234, 7);
        let sum: u32 = packet
            .chunks_exact(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn only_replies_of_the_target_to_us_count() {
        let target = Ipv4Addr::new(10, 91, 0, 50);
        let mut packet = vec![0_u8; 36];
        packet[0] = 0x45;
        packet[12..16].copy_from_slice(&target.octets());
        packet[24..26].copy_from_slice(&7_u16.to_be_bytes());
        assert!(is_echo_reply(&packet, target, 7));
        assert!(!is_echo_reply(&packet, target, 8));
        assert!(!is_echo_reply(&packet, Ipv4Addr::LOCALHOST, 7));
        assert!(!is_echo_reply(&packet[..20], target, 7));
        packet[20] = 8;
        assert!(!is_echo_reply(&packet, target, 7));
    }

    #[test]
    fn this_machine_answers_its_own_probe() {
        // Needs root, as everything in this crate.
        let probe = Probe::start(Path::new("/proc/self/ns/net"), Ipv4Addr::LOCALHOST).unwrap();
        let first = probe.wait_answer(Duration::from_secs(30)).unwrap();
        let mut last = first;
        for _ in 0..50 {
            last = probe.wait_answer(Duration::from_secs(30)).unwrap();
        }
        assert!(probe.sent() > 50);
        // How long a silence is depends on how busy this machine is, but it is one between two answers.
        let gap = probe.longest_gap(first, last);
        assert!(gap.from_ns < gap.to_ns && gap.to_ns <= last, "{gap:?}");
        assert!(probe.first_answer_after(first).is_some_and(|next| next <= last));
    }
}
