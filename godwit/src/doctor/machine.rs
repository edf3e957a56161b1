//! The machine itself: kernel, CPU, memory, limits, cgroups, user faults, entropy, terminal. Files of `/proc` and `/sys` only.

use std::path::Path;

use super::{Check, Checks, Look, State, Topic, topic};
use crate::out::units::show_bytes;

pub(super) const TOPICS: &[&Topic] = &[
    &topic::KERNEL,
    &topic::CPU,
    &topic::USER_FAULTS,
    &topic::CGROUPS,
    &topic::MEMORY,
    &topic::HUGE_PAGES,
    &topic::SWAP,
    &topic::FILES,
    &topic::PROCESSES,
    &topic::ENTROPY,
    &topic::TERMINAL,
];

/// Less than this free, and the first VM is too large.
const MEMORY_FREE_MIN: u64 = 512 << 20;
const FILES_MIN: u64 = 1024;
const FILES_GOOD: u64 = 16_384;
const PROCESSES_MIN: u64 = 512;
const PROCESSES_GOOD: u64 = 8192;
const ENTROPY_BITS_MIN: u64 = 128;

pub(super) fn look(look: &Look) -> Checks {
    vec![
        kernel(look),
        cpu(look),
        user_faults(look),
        cgroups(look),
        memory(look),
        huge_pages(look),
        swap(look),
        limit(look, &topic::FILES, "Max open files", "nofile", FILES_MIN, FILES_GOOD),
        limit(
            look,
            &topic::PROCESSES,
            "Max processes",
            "nproc",
            PROCESSES_MIN,
            PROCESSES_GOOD,
        ),
        entropy(look),
        terminal(look),
    ]
}

fn unread(topic: &Topic, path: &str) -> Check {
    Check::skipped(topic, format!("{path} cannot be read or has another form"))
        .mend("mount proc on /proc and sysfs on /sys, or run outside of the container")
}

fn kernel(look: &Look) -> Check {
    let topic = &topic::KERNEL;
    let path = "/proc/sys/kernel/osrelease";
    let Ok(release) = look.read(path) else {
        return unread(topic, path);
    };
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse::<u32>());
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return unread(topic, path);
    };
    let mend = match look.system {
        super::look::System::Apt => format!(
            "{} (Ubuntu: linux-generic), then reboot",
            look.command("apt install linux-image-amd64")
        ),
        super::look::System::Other => "install a newer kernel, then reboot".to_owned(),
    };
    match (major, minor) {
        version if version < (5, 6) => Check::problem(topic, format!("Linux {release}, older than 5.6"), mend),
        version if version < (5, 14) => Check::warning(topic, format!("Linux {release}, older than 5.14"), mend),
        _ => Check::ok(topic, format!("Linux {release}")),
    }
}

fn cpu(look: &Look) -> Check {
    let topic = &topic::CPU;
    if look.architecture != "x86_64" {
        let seen = format!("a CPU of kind {}", look.architecture);
        return Check::problem(
            topic,
            seen,
            "use a machine with an x86-64 CPU: Godwit runs no other guests",
        );
    }
    let Ok(text) = look.read("/proc/cpuinfo") else {
        return unread(topic, "/proc/cpuinfo");
    };
    let flags = text.lines().find_map(|line| line.strip_prefix("flags"));
    let Some(flags) = flags.and_then(|line| line.split_once(':')).map(|(_, flags)| flags) else {
        return unread(topic, "/proc/cpuinfo");
    };
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    if has("vmx") {
        Check::ok(topic, "x86-64 with VT-x")
    } else if has("svm") {
        Check::ok(topic, "x86-64 with AMD-V")
    } else if has("hypervisor") {
        Check::warning(
            topic,
            "x86-64 without virtualisation; this machine is itself a VM",
            "have its host pass virtualisation on: there, `modprobe kvm_intel nested=1` (or kvm_amd), and for this VM the CPU model `host`",
        )
    } else {
        Check::warning(
            topic,
            "x86-64 without virtualisation",
            "switch VT-x (Intel) or SVM (AMD) on in the firmware's setup, and power the machine off once",
        )
    }
}

fn user_faults(look: &Look) -> Check {
    let topic = &topic::USER_FAULTS;
    let setting = look.number("/proc/sys/vm/unprivileged_userfaultfd");
    let mode = std::fs::metadata(look.path("/dev/userfaultfd"));
    let device_is_open = mode
        .as_ref()
        .is_ok_and(|data| std::os::unix::fs::PermissionsExt::mode(&data.permissions()) & 0o006 == 0o006);
    match setting {
        Some(1) => Check::ok(topic, "vm.unprivileged_userfaultfd = 1"),
        _ if device_is_open => Check::ok(topic, "/dev/userfaultfd is open to all users"),
        Some(_) => Check::warning(
            topic,
            "vm.unprivileged_userfaultfd = 0, and /dev/userfaultfd is not open to QEMU's users",
            look.sysctl("vm.unprivileged_userfaultfd = 1"),
        ),
        None => Check::warning(
            topic,
            "this kernel has no user faults",
            "use a distribution's kernel, or one built with CONFIG_USERFAULTFD=y",
        ),
    }
}

fn cgroups(look: &Look) -> Check {
    let topic = &topic::CGROUPS;
    let top = "/sys/fs/cgroup";
    let reboot =
        "boot with the kernel parameter systemd.unified_cgroup_hierarchy=1 (in /etc/default/grub, then update-grub)";
    if look.exists(format!("{top}/cgroup.controllers")) {
        // The files are in every group but the topmost.
        let groups: Vec<String> = look
            .names(top)
            .into_iter()
            .filter(|name| look.exists(format!("{top}/{name}/cgroup.procs")))
            .collect();
        let any = |file: &str| groups.iter().any(|group| look.exists(format!("{top}/{group}/{file}")));
        return match (groups.is_empty(), any("cgroup.freeze"), any("cgroup.kill")) {
            (true, ..) => Check::ok(topic, "version 2; no group to see whether it can freeze and kill"),
            (_, true, true) => Check::ok(topic, "version 2, with freeze and kill"),
            (_, true, false) => Check::warning(topic, "version 2 without cgroup.kill", "use Linux 5.14 or newer"),
            _ => Check::warning(topic, "version 2 without cgroup.freeze", "use Linux 5.14 or newer"),
        };
    }
    let freezer = look.exists(format!("{top}/freezer"));
    match (look.names(top).is_empty(), freezer) {
        (true, _) => Check::warning(
            topic,
            format!("nothing is mounted at {top}"),
            look.command("mount -t cgroup2 none /sys/fs/cgroup"),
        ),
        (_, true) => Check::warning(topic, "version 1 with freeze; it has no kill", reboot),
        _ => Check::warning(topic, "version 1 without freeze and kill", reboot),
    }
}

/// A line of `/proc/meminfo` in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn memory(look: &Look) -> Check {
    let topic = &topic::MEMORY;
    let text = look.read("/proc/meminfo").unwrap_or_default();
    let (Some(total), Some(free)) = (meminfo(&text, "MemTotal"), meminfo(&text, "MemAvailable")) else {
        return unread(topic, "/proc/meminfo");
    };
    let seen = format!("{} available of {}", show_bytes(free), show_bytes(total));
    if free < MEMORY_FREE_MIN {
        Check::warning(
            topic,
            seen,
            "add memory, or end what takes it: ps -eo rss,pid,comm --sort=-rss | head",
        )
    } else {
        Check::ok(topic, seen)
    }
}

fn huge_pages(look: &Look) -> Check {
    let topic = &topic::HUGE_PAGES;
    let path = "/sys/kernel/mm/transparent_hugepage/enabled";
    let Ok(text) = look.read(path) else {
        return Check::warning(
            topic,
            "this kernel has no transparent huge pages",
            "use a distribution's kernel, or one built with CONFIG_TRANSPARENT_HUGEPAGE=y",
        );
    };
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    match chosen.map(|(word, _)| word) {
        Some(word @ ("always" | "madvise")) => Check::ok(topic, format!("transparent, {word}")),
        Some("never") => Check::warning(
            topic,
            "transparent huge pages are off",
            format!(
                "echo madvise | {} ; for each start, the kernel parameter transparent_hugepage=madvise",
                look.command(&format!("tee {path}"))
            ),
        ),
        _ => unread(topic, path),
    }
}

fn swap(look: &Look) -> Check {
    let topic = &topic::SWAP;
    let text = look.read("/proc/meminfo").unwrap_or_default();
    let (Some(total), Some(free)) = (meminfo(&text, "SwapTotal"), meminfo(&text, "SwapFree")) else {
        return unread(topic, "/proc/meminfo");
    };
    if total == 0 {
        return Check::ok(topic, "none: what has no room in memory is killed, not slowed");
    }
    let used = total.saturating_sub(free);
    let seen = format!("{} used of {}", show_bytes(used), show_bytes(total));
    if used > total / 2 {
        let mend = "run fewer or smaller VMs here, or add memory; less eager: ".to_owned();
        Check::warning(topic, seen, mend + &look.sysctl("vm.swappiness = 1"))
    } else {
        Check::ok(topic, seen)
    }
}

fn limit(look: &Look, topic: &'static Topic, line: &str, name: &str, least: u64, good: u64) -> Check {
    let path = "/proc/self/limits";
    let text = look.read(path).unwrap_or_default();
    let values = text
        .lines()
        .find_map(|text| text.strip_prefix(line))
        .unwrap_or_default();
    let mut values = values.split_ascii_whitespace();
    let mut value = || match values.next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    };
    let (Some(soft), Some(hard)) = (value(), value()) else {
        return unread(topic, path);
    };
    let show = |value: u64| match value {
        u64::MAX => "unlimited".to_owned(),
        value => value.to_string(),
    };
    let mend = format!(
        "in the unit of the service LimitNOFILE=1048576 and LimitNPROC=infinity; for logins: echo '* - {name} 1048576' | {}",
        look.command("tee -a /etc/security/limits.d/godwit.conf")
    );
    let seen = format!("{}, at most {}", show(soft), show(hard));
    match soft {
        soft if soft < least => Check::problem(topic, seen, mend),
        soft if soft < good => Check::warning(topic, seen, mend),
        _ => Check::ok(topic, seen),
    }
}

fn entropy(look: &Look) -> Check {
    let topic = &topic::ENTROPY;
    let path = "/proc/sys/kernel/random/entropy_avail";
    match look.number(path) {
        None => unread(topic, path),
        Some(bits) if bits < ENTROPY_BITS_MIN => Check::warning(
            topic,
            format!("{bits} bits"),
            look.install("rng-tools-debian", "rng-tools") + "; in a VM, give it a virtio random device",
        ),
        Some(bits) => Check::ok(topic, format!("{bits} bits")),
    }
}

fn terminal(look: &Look) -> Check {
    let topic = &topic::TERMINAL;
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .find_map(|name| look.variable(name));
    let locale = locale.unwrap_or_else(|| "C".to_owned());
    let term = look.variable("TERM").unwrap_or_default();
    let bare = locale.to_ascii_lowercase().replace('-', "");
    let seen = format!(
        "locale {locale}, terminal {}",
        if term.is_empty() { "none" } else { &term }
    );
    if !bare.contains("utf8") {
        return Check::warning(topic, seen, "export LANG=C.UTF-8 (in ~/.profile to keep it)");
    }
    if term == "dumb" && Path::new("/dev/tty").exists() {
        return Check::new(topic, State::Ok, format!("{seen}: no progress line is drawn"));
    }
    Check::ok(topic, seen)
}

#[cfg(test)]
mod tests {
    use super::super::look::tests::{Fake, empty};
    use super::*;

    fn of(fake: Fake, check: fn(&Look) -> Check) -> (State, String, String) {
        let check = check(&fake.look());
        (check.state, check.seen, check.mend.unwrap_or_default())
    }

    fn state(fake: Fake, check: fn(&Look) -> Check) -> State {
        of(fake, check).0
    }

    #[test]
    fn the_kernel_is_new_enough_old_or_too_old() {
        let with = |release: &str| empty().with("/proc/sys/kernel/osrelease", release);
        assert_eq!(state(with("6.1.0-18-amd64\n"), kernel), State::Ok);
        assert_eq!(state(with("5.14.0"), kernel), State::Ok);
        assert_eq!(state(with("5.10.0-28-amd64"), kernel), State::Warning);
        let (state_, seen, mend) = of(with("4.19.0"), kernel);
        assert_eq!(state_, State::Problem);
        assert!(seen.contains("older than 5.6") && mend.contains("apt install linux-image-amd64"));
        assert_eq!(state(with("strange"), kernel), State::Skipped);
        assert_eq!(state(empty(), kernel), State::Skipped);
    }

    #[test]
    fn a_cpu_virtualises_or_says_where_to_switch_it_on() {
        let with = |flags: &str| empty().with("/proc/cpuinfo", &format!("processor : 0\nflags\t\t: fpu {flags}\n"));
        assert_eq!(of(with("vmx"), cpu).1, "x86-64 with VT-x");
        assert_eq!(of(with("svm"), cpu).1, "x86-64 with AMD-V");
        assert!(of(with("hypervisor"), cpu).2.contains("nested=1"));
        assert!(of(with("sse"), cpu).2.contains("firmware"));
        assert_eq!(state(with("svm_lock"), cpu), State::Warning, "another flag");
        let mut arm = empty().look();
        arm.architecture = "aarch64".to_owned();
        assert_eq!(cpu(&arm).state, State::Problem);
        assert_eq!(state(empty(), cpu), State::Skipped);
    }

    #[test]
    fn user_faults_are_let_by_the_setting_or_the_device() {
        let with = |value: &str| empty().with("/proc/sys/vm/unprivileged_userfaultfd", value);
        assert_eq!(state(with("1\n"), user_faults), State::Ok);
        let (state_, _, mend) = of(with("0\n"), user_faults);
        assert_eq!(state_, State::Warning);
        assert!(mend.contains("vm.unprivileged_userfaultfd = 1"), "{mend}");
        let device = |mode| {
            let fake = with("0").with("/dev/userfaultfd", "");
            let mode: std::fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(fake.path("/dev/userfaultfd"), mode).unwrap();
            fake
        };
        assert_eq!(state(device(0o666), user_faults), State::Ok);
        assert_eq!(state(device(0o600), user_faults), State::Warning);
        assert!(of(empty(), user_faults).1.contains("no user faults"));
    }

    #[test]
    fn cgroups_are_told_by_version_and_by_what_they_can() {
        let v2 = || empty().with("/sys/fs/cgroup/cgroup.controllers", "cpu memory");
        assert_eq!(state(v2(), cgroups), State::Ok);
        let group = || v2().with("/sys/fs/cgroup/system.slice/cgroup.procs", "");
        assert_eq!(of(group(), cgroups).1, "version 2 without cgroup.freeze");
        let freezes = group().with("/sys/fs/cgroup/system.slice/cgroup.freeze", "0");
        assert_eq!(of(freezes, cgroups).1, "version 2 without cgroup.kill");
        let whole = group()
            .with("/sys/fs/cgroup/system.slice/cgroup.freeze", "0")
            .with("/sys/fs/cgroup/system.slice/cgroup.kill", "");
        assert_eq!(of(whole, cgroups).1, "version 2, with freeze and kill");
        let v1 = empty().with("/sys/fs/cgroup/freezer/tasks", "");
        assert_eq!(of(v1, cgroups).1, "version 1 with freeze; it has no kill");
        let bare = empty().with("/sys/fs/cgroup/cpu/tasks", "");
        assert_eq!(of(bare, cgroups).1, "version 1 without freeze and kill");
        assert!(of(empty(), cgroups).1.contains("nothing is mounted"));
    }

    #[test]
    fn memory_and_swap_are_judged_by_what_is_left() {
        let with = |free: u64, swap: u64, swap_free: u64| {
            let text = format!(
                "MemTotal:  8388608 kB\nMemAvailable: {free} kB\nSwapTotal: {swap} kB\nSwapFree: {swap_free} kB\n"
            );
            empty().with("/proc/meminfo", &text)
        };
        assert_eq!(of(with(4 << 20, 0, 0), memory).1, "4.0 GiB available of 8.0 GiB");
        assert_eq!(state(with(100 << 10, 0, 0), memory), State::Warning);
        assert_eq!(
            state(empty().with("/proc/meminfo", "MemTotal: lots"), memory),
            State::Skipped
        );
        assert!(of(with(1, 0, 0), swap).1.starts_with("none"));
        assert_eq!(
            of(with(1, 1024, 1024), swap),
            (State::Ok, "0 B used of 1.0 MiB".into(), String::new())
        );
        assert_eq!(state(with(1, 1024, 100), swap), State::Warning);
        assert_eq!(state(empty(), swap), State::Skipped);
    }

    #[test]
    fn huge_pages_are_on_off_or_absent() {
        let with = |text: &str| empty().with("/sys/kernel/mm/transparent_hugepage/enabled", text);
        assert_eq!(state(with("always [madvise] never\n"), huge_pages), State::Ok);
        assert_eq!(state(with("[always] madvise never"), huge_pages), State::Ok);
        let (off, _, mend) = of(with("always madvise [never]"), huge_pages);
        assert_eq!(off, State::Warning);
        assert!(mend.starts_with("echo madvise | tee /sys/"), "{mend}");
        assert_eq!(state(with("?"), huge_pages), State::Skipped);
        assert_eq!(state(empty(), huge_pages), State::Warning);
    }

    #[test]
    fn limits_are_enough_few_or_too_few() {
        let files = |look: &Look| limit(look, &topic::FILES, "Max open files", "nofile", FILES_MIN, FILES_GOOD);
        let with = |soft: &str, hard: &str| {
            let text =
                format!("Limit   Soft Limit\nMax open files            {soft}                {hard}       files\n");
            empty().with("/proc/self/limits", &text)
        };
        assert_eq!(state(with("1048576", "1048576"), files), State::Ok);
        assert_eq!(
            of(with("unlimited", "unlimited"), files).1,
            "unlimited, at most unlimited"
        );
        assert_eq!(state(with("1024", "524288"), files), State::Warning);
        let (few, _, mend) = of(with("256", "256"), files);
        assert_eq!(few, State::Problem);
        assert!(
            mend.contains("LimitNOFILE=1048576") && mend.contains("* - nofile"),
            "{mend}"
        );
        assert_eq!(state(empty(), files), State::Skipped);
    }

    #[test]
    fn entropy_and_terminal() {
        let bits = |bits: &str| empty().with("/proc/sys/kernel/random/entropy_avail", bits);
        assert_eq!(state(bits("256\n"), entropy), State::Ok);
        assert_eq!(state(bits("12"), entropy), State::Warning);
        assert_eq!(state(bits("many"), entropy), State::Skipped);
        assert_eq!(state(empty().variable("LANG", "de_DE.UTF-8"), terminal), State::Ok);
        assert_eq!(state(empty().variable("LC_ALL", "C.utf8"), terminal), State::Ok);
        assert_eq!(state(empty(), terminal), State::Warning);
        let overridden = empty().variable("LANG", "en_GB.UTF-8").variable("LC_ALL", "POSIX");
        assert_eq!(state(overridden, terminal), State::Warning);
    }
}
