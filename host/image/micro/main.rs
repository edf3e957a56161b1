//! The guest program of the micro template: a web server that can tell whether its machine's time, memory and disk survived.
//!
//! ```text
//!   :80  http ──┬── ticks   1 ms thread, its largest gap
//!               ├── memory  a working set rewritten and verified, page by page
//!               └── disk    /dev/vda written, synced, read back past the page cache
//!   :7   UDP echo, the counter appended
//!   /dev/input/event*       the power button: sync, power off
//! ```
//!
//! Standard library only: Godwit's build script compiles this file statically and the initramfs carries it. It runs under
//! busybox init. Everything is bounded: connections, header bytes, the working set. The counter grows by one for each
//! answer, so a client that sees it stand or fall has met a copy of the machine or its past.

mod disk;
mod http;
mod memory;
mod power;
// The library offers the same file to clients, hence its `pub`.
#[allow(unreachable_pub)]
mod stream;
mod ticks;

use std::net::UdpSocket;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What all threads share.
struct Guest {
    name: String,
    started: Instant,
    ticks: ticks::Ticks,
    counter: AtomicU64,
    memory: memory::Writer,
    disk: Mutex<disk::Disk>,
}

impl Guest {
    /// The next value of the counter: unique to one answer.
    fn count(&self) -> u64 {
        self.counter.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The body of `GET /status`.
    fn status(&self) -> String {
        let gap = self.ticks.largest();
        format!(
            "{{\"name\":\"{}\",\"uptime_ms\":{},\"ticks\":{},\"largest_gap_us\":{},\"gap_since\":{},\"gap_at_ms\":{},\"counter\":{},\
             \"memory_writer\":{},\"disk\":{}}}\n",
            self.name,
            self.started.elapsed().as_millis(),
            self.ticks.count(),
            gap.largest_us,
            gap.since_ms,
            gap.at_ms,
            self.count(),
            self.memory.status(),
            lock(&self.disk).status(),
        )
    }
}

/// Locks, whatever a thread that died holding the lock left: each guarded value is valid between statements.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The value of `godwit.name` on the kernel command line, made safe to print in JSON and HTML.
fn name_from(command_line: &str) -> String {
    let given = command_line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("godwit.name="));
    given
        .unwrap_or("micro")
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c))
        .take(63)
        .collect()
}

fn main() {
    let started = Instant::now();
    let guest = Arc::new(Guest {
        name: name_from(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default()),
        started,
        ticks: ticks::Ticks::start(started),
        counter: AtomicU64::new(0),
        memory: memory::Writer::default(),
        disk: Mutex::new(disk::Disk::default()),
    });
    power::watch();
    let echoing = Arc::clone(&guest);
    std::thread::spawn(move || echo(&echoing));
    if let Err(error) = http::serve(&guest) {
        eprintln!("godwit-micro: cannot listen on port 80: {error}");
        std::process::exit(1);
    }
}

/// Answers each datagram on port 7 with itself and the counter, 8 bytes big-endian.
fn echo(guest: &Guest) {
    let socket = match UdpSocket::bind("0.0.0.0:7") {
        Ok(socket) => socket,
        Err(error) => return eprintln!("godwit-micro: cannot listen on UDP port 7: {error}"),
    };
    let mut buffer = [0; 1480];
    loop {
        // An error here is one peer's ICMP refusal: the next datagram is somebody else's.
        if let Ok((length, peer)) = socket.recv_from(&mut buffer[..1472]) {
            buffer[length..length + 8].copy_from_slice(&guest.count().to_be_bytes());
            let _ = socket.send_to(&buffer[..length + 8], peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_from_the_command_line_cannot_break_json_or_html() {
        assert_eq!(name_from("console=ttyS0 godwit.name=web1 quiet"), "web1");
        assert_eq!(name_from("godwit.name=<a\"b\\c>"), "abc");
        assert_eq!(name_from("quiet"), "micro");
    }
}
