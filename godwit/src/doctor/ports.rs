//! Who listens on the controller's ports, and which other managers of VMs run here.

use super::{Check, Checks, Look, Topic, topic};

pub(super) const TOPICS: &[&Topic] = &[&topic::PORTS, &topic::MANAGERS];

/// Other managers of VMs: the name of the process, and how to be rid of it.
const MANAGERS: [(&str, &str); 9] = [
    ("libvirtd", "systemctl disable --now libvirtd.socket libvirtd"),
    ("virtqemud", "systemctl disable --now virtqemud.socket virtqemud"),
    ("incusd", "systemctl disable --now incus.socket incus"),
    ("lxd", "snap disable lxd"),
    ("pvedaemon", ""),
    ("xend", ""),
    ("nova-compute", ""),
    ("vdsmd", ""),
    ("cloudstack-agen", ""),
];

/// The state of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

pub(super) fn look(look: &Look) -> Checks {
    let mut checks: Checks = look.asked.ports.iter().map(|port| of_port(look, *port)).collect();
    checks.push(managers(look));
    checks
}

/// All processes that can be seen: number and name.
pub(super) fn processes(look: &Look) -> Vec<(u32, String)> {
    let numbers = look.names("/proc").into_iter().filter_map(|name| name.parse().ok());
    let named = |pid: u32| Some((pid, look.read(format!("/proc/{pid}/comm")).ok()?));
    numbers.filter_map(named).collect()
}

/// The socket that listens on a port, by its inode.
fn listening(look: &Look, port: u16) -> Option<u64> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| look.read(path).unwrap_or_default());
    tables.iter().flat_map(|table| table.lines().skip(1)).find_map(|line| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let (address, state, inode) = (words.get(1)?, words.get(3)?, words.get(9)?);
        let (_, hexadecimal) = address.rsplit_once(':')?;
        let matches = *state == LISTEN && u16::from_str_radix(hexadecimal, 16) == Ok(port);
        matches.then(|| inode.parse().ok()).flatten()
    })
}

/// The process that holds a socket; root sees those of all users.
fn holder(look: &Look, inode: u64) -> Option<(u32, String)> {
    let wanted = format!("socket:[{inode}]");
    processes(look).into_iter().find(|(pid, _)| {
        let entries = std::fs::read_dir(look.path(format!("/proc/{pid}/fd")));
        let mut links = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok());
        links.any(|link| link.as_os_str() == wanted.as_str())
    })
}

fn of_port(look: &Look, port: u16) -> Check {
    let topic = &topic::PORTS;
    let check = match listening(look, port) {
        None => Check::ok(topic, "free"),
        Some(inode) => match holder(look, inode) {
            Some((pid, name)) if name == "godwit" => Check::ok(topic, format!("godwit listens (process {pid})")),
            Some((pid, name)) => Check::problem(
                topic,
                format!("{name} listens (process {pid})"),
                format!(
                    "end it ({}), or start the controller with other ports: --listen, --agent-listen ADDRESS:PORT",
                    look.command(&format!("kill {pid}"))
                ),
            ),
            None if !look.is_root => Check::needs_root(topic, "somebody listens; only root sees who"),
            None => Check::warning(
                topic,
                "somebody listens who cannot be seen from here (a container?)",
                format!("see who: {}", look.command(&format!("ss -ltnp 'sport = :{port}'"))),
            ),
        },
    };
    check.about(port.to_string())
}

fn managers(look: &Look) -> Check {
    let topic = &topic::MANAGERS;
    let running = processes(look);
    let found: Vec<_> = MANAGERS
        .iter()
        .filter(|(name, _)| running.iter().any(|(_, process)| process == name))
        .collect();
    let Some((_, ending)) = found.first() else {
        return Check::ok(topic, "none runs");
    };
    let names: Vec<_> = found.iter().map(|(name, _)| *name).collect();
    let mend = match *ending {
        "" => "use another machine for Godwit".to_owned(),
        ending => format!("when its VMs are gone: {}", look.command(ending)),
    };
    Check::warning(topic, format!("{} runs", names.join(", ")), mend)
}

#[cfg(test)]
mod tests {
    use super::super::{
        State,
        look::tests::{Fake, empty},
    };
    use super::*;

    const HEADING: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    /// A machine on which the process `name` listens on port 7443.
    fn listens(name: &str) -> Fake {
        let line =
            "   0: 00000000:1D13 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1\n";
        let fake = empty().with("/proc/net/tcp", &format!("{HEADING}{line}"));
        let fake = fake
            .with("/proc/42/comm", &format!("{name}\n"))
            .with("/proc/42/fd/.keep", "");
        std::os::unix::fs::symlink("socket:[4711]", fake.path("/proc/42/fd/7")).unwrap();
        fake
    }

    #[test]
    fn a_port_is_free_ours_or_anothers() {
        assert_eq!(of_port(&empty().look(), 7443).seen, "free");
        assert_eq!(of_port(&listens("godwit").look(), 7443).state, State::Ok);
        assert_eq!(of_port(&listens("nginx").look(), 7444).state, State::Ok);
        let taken = of_port(&listens("nginx").look(), 7443);
        assert_eq!(
            (taken.state, taken.seen.as_str(), taken.about.as_deref()),
            (State::Problem, "nginx listens (process 42)", Some("7443"))
        );
        assert!(taken.mend.unwrap().contains("--listen"));
    }

    #[test]
    fn a_holder_that_cannot_be_seen_is_not_guessed() {
        let fake = listens("nginx");
        std::fs::remove_file(fake.path("/proc/42/fd/7")).unwrap();
        let mut look = fake.look();
        assert_eq!(of_port(&look, 7443).state, State::Warning);
        look.is_root = false;
        assert_eq!(of_port(&look, 7443).state, State::Skipped);
    }

    #[test]
    fn a_connection_is_no_listener_and_nonsense_is_passed_over() {
        let lines = "   0: 0100007F:1D13 0100007F:9999 01 0:0 0:0 0 0 0 1 1\nx\n\n 1: zz:zz\n";
        let fake = empty().with("/proc/net/tcp6", &format!("{HEADING}{lines}"));
        assert_eq!(of_port(&fake.look(), 7443).seen, "free");
    }

    #[test]
    fn other_managers_are_named() {
        assert_eq!(managers(&empty().look()).state, State::Ok);
        let libvirt = empty().with("/proc/9/comm", "libvirtd\n").with("/proc/cpuinfo", "");
        let check = managers(&libvirt.look());
        assert_eq!((check.state, check.seen.as_str()), (State::Warning, "libvirtd runs"));
        assert!(check.mend.unwrap().contains("systemctl disable --now libvirtd"));
        let proxmox = managers(&empty().with("/proc/9/comm", "pvedaemon").look());
        assert_eq!(proxmox.mend.as_deref(), Some("use another machine for Godwit"));
    }
}
