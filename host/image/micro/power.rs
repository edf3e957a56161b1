//! The power button, power off, reboot and a wanted kernel panic.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Command;

/// `struct input_event` on 64-bit Linux: two longs of time, type, code, value.
const EVENT_BYTES: usize = 24;
/// `EV_KEY` and `KEY_POWER` of linux/input-event-codes.h.
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Opens each input device and starts a thread that waits for the power key. The kernel keeps what is pressed from the
/// opening on, so a guest that serves afterwards hears every press.
pub(crate) fn watch() {
    let devices = std::fs::read_dir("/dev/input").into_iter().flatten().flatten();
    for device in devices.filter(|entry| entry.file_name().to_string_lossy().starts_with("event")) {
        if let Ok(file) = File::open(device.path()) {
            let thread = std::thread::Builder::new().stack_size(64 << 10);
            let _ = thread.spawn(move || wait_for_power_key(file));
        }
    }
}

/// Reads events until the device goes; powers off at the press of the power key.
fn wait_for_power_key(mut events: File) {
    let mut event = [0; EVENT_BYTES];
    while events.read_exact(&mut event).is_ok() {
        let half = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
        if half(16) == EV_KEY && half(18) == KEY_POWER && event[20] == 1 {
            println!("godwit-micro: power button pressed");
            act("off");
        }
    }
}

/// Does `off`, `reboot` or `panic`; false for any other word. Data is synced first, except before a panic.
pub(crate) fn act(action: &str) -> bool {
    let applet = match action {
        "off" => "poweroff",
        "reboot" => "reboot",
        "panic" => {
            // Magic SysRq c: the kernel crashes itself (Documentation/admin-guide/sysrq.rst).
            let crashed = File::options()
                .write(true)
                .open("/proc/sysrq-trigger")
                .and_then(|mut file| file.write_all(b"c"));
            eprintln!("godwit-micro: the kernel did not panic: {crashed:?}");
            return true;
        }
        _ => return false,
    };
    let _ = Command::new("/bin/busybox").arg("sync").status();
    if let Err(error) = Command::new("/bin/busybox").args([applet, "-f"]).status() {
        eprintln!("godwit-micro: {applet}: {error}");
    }
    true
}
