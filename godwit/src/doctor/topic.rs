//! What is checked: each check's stable id, whom it concerns, and why it matters.

use serde::Serialize;

/// What a machine is to Godwit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    /// A host that runs VMs
    Agent,
    /// The machine that decides and remembers
    Controller,
    /// A machine from which people and tools ask
    Client,
}

impl Role {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Agent, Self::Controller, Self::Client];

    /// The word for it.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Controller => "controller",
            Self::Client => "client",
        }
    }
}

/// What a check is about.
#[derive(Debug)]
pub(crate) struct Topic {
    /// Stable.
    pub(crate) id: &'static str,
    pub(crate) roles: &'static [Role],
    pub(crate) why: &'static str,
}

const AGENT: &[Role] = &[Role::Agent];
const CONTROLLER: &[Role] = &[Role::Controller];
const CLIENT: &[Role] = &[Role::Client];
const SERVERS: &[Role] = &[Role::Agent, Role::Controller];
const EVERYBODY: &[Role] = &Role::ALL;

macro_rules! topics {
    ($($name:ident = $id:literal, $roles:expr, $why:literal;)*) => {
        $(pub(crate) static $name: Topic = Topic { id: $id, roles: $roles, why: $why };)*
        /// All topics, in the order in which they are shown.
        pub(crate) static ALL: &[&Topic] = &[$(&$name),*];
    };
}

topics! {
    KERNEL = "kernel", SERVERS, "files of pools are opened with openat2(2) (Linux 5.6); guests are cleared away at once with cgroup.kill (5.14)";
    CPU = "cpu", AGENT, "guests run at the CPU's own speed only where it virtualises";
    ACCELERATOR = "accelerator", AGENT, "with KVM guests run at the CPU's speed, and apart from the host; emulated (TCG) they commonly compute 5 to 20 times slower, and QEMU does not call emulation a security boundary: run no strangers' guests so";
    QEMU = "qemu.version", AGENT, "QEMU runs the guests; 7.2 is the oldest that is driven";
    QEMU_EMULATED = "qemu.emulated-moves", AGENT, "QEMU before 10 loses pages that an emulated guest writes while it is copied, so such a guest stands for the whole of a move (docs/adr/0022)";
    QEMU_MACHINES = "qemu.machines", AGENT, "a VM keeps its exact machine type: it starts on, and moves to, only hosts whose QEMU has that type";
    QEMU_IMG = "qemu.img", AGENT, "templates are imported, and disks made, with qemu-img";
    USER_FAULTS = "user-faults", AGENT, "post-copy moves fetch a guest's pages when it touches them (userfaultfd(2)); QEMU runs as a user without privileges, and must be let";
    CGROUPS = "cgroups", AGENT, "guests are bounded, frozen and cleared away as groups";
    MEMORY = "memory", SERVERS, "guests' memory comes from the host's; where there is none left, the kernel kills processes";
    HUGE_PAGES = "memory.huge-pages", AGENT, "guests with huge pages miss the TLB less: many run 5 to 20 % faster";
    SWAP = "memory.swap", AGENT, "guests whose memory is swapped out stand still for long, and their moves take longer";
    FILES = "limits.files", SERVERS, "each guest and each connection holds several open files";
    PROCESSES = "limits.processes", SERVERS, "each guest is a process with a thread for each of its CPUs and more";
    ENTROPY = "entropy", EVERYBODY, "keys and tokens are made of random bytes; without entropy that waits, or the guests' do";
    SPACE = "storage.space", SERVERS, "a full file system stops guests that write, and a controller";
    FILE_SYSTEM = "storage.file-system", SERVERS, "state must survive a reboot and be locked well, which network file systems and memory do not do";
    DIRECT_IO = "storage.direct-io", AGENT, "disks are best opened with O_DIRECT: without it each block is cached twice, and a move over shared storage can see stale data";
    REFLINK = "storage.reflink", AGENT, "where files can share blocks, whole copies of a disk are made at once and take no room";
    POOL_TOKEN = "storage.token", AGENT, "by its token file hosts know that they see the same pool";
    NET_TOOLS = "network.tools", AGENT, "filters of guests' traffic are set with nft; ip shows what the agent made";
    NET_KINDS = "network.kinds", AGENT, "VMs' networks are made of bridges, taps, veth pairs and VXLAN";
    NFTABLES = "network.nftables", AGENT, "the kernel filters guests' traffic with nftables";
    BRIDGE_FILTER = "network.bridge-filter", AGENT, "with bridge-nf-call-iptables the host's firewall also judges frames between VMs, and Docker's drops them";
    FORWARDING = "network.forwarding", AGENT, "guests reach what is beyond their network through this host only if it forwards";
    REVERSE_PATH = "network.reverse-path", AGENT, "a strict reverse-path filter drops answers that take another uplink";
    MTU = "network.mtu", AGENT, "packets that are larger than what the uplink carries vanish; VXLAN adds 50 bytes to each";
    BRIDGE = "network.bridge", AGENT, "the agent changes no bridge that it did not make";
    MANAGERS = "managers", AGENT, "another manager of VMs on the same host takes memory and networks that Godwit counts as its own";
    PORTS = "ports", CONTROLLER, "people and joining hosts connect to the first port, agents to the second";
    CLOCK = "clock", EVERYBODY, "certificates and tokens are valid by the clock, and logs of several machines are read together";
    PRIVATE = "files.private", EVERYBODY, "who can read a key or a token is this machine to the others";
    IDENTITY = "identity", AGENT, "a host whose certificate has run out is no longer believed; the agent renews it in time while it has a session";
    CONTROLLER_REACHED = "controller", &[Role::Agent, Role::Client], "nothing is ordered or asked without the controller";
    CONTROLLER_VERSION = "controller.version", CLIENT, "a client and a controller of different versions may not know each other's answers";
    CONTROLLER_CLOCK = "controller.clock", &[Role::Agent, Role::Client], "a certificate that was made just now is not yet valid by a clock that is a day behind; times that are shown differ";
    TERMINAL = "terminal", CLIENT, "names and progress are shown in UTF-8";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ids_are_unique_and_every_one_is_in_the_document() {
        let ids: BTreeSet<_> = ALL.iter().map(|topic| topic.id).collect();
        assert_eq!(ids.len(), ALL.len());
        let document = include_str!("../../../docs/command-line.md");
        for id in ids {
            assert!(
                document.contains(&format!("`{id}`")),
                "{id} is not in docs/command-line.md"
            );
        }
    }
}
