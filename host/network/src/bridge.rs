//! Bridges: made, completed when half made, and removed; those that others made are checked but never changed.

use std::{fs, io, net::IpAddr, path::PathBuf};

use rustix::io::Errno;

use crate::{
    InterfaceName, Network,
    link::{self, Address, Change, Link},
    netlink::{Netlink, NetlinkError},
};

/// The alias that marks a bridge as made by this crate.
const BRIDGE_ALIAS: &str = "godwit bridge";
/// Smallest frame payload that IPv4 allows a link to have (RFC 791).
const MTU_MIN: u32 = 68;
/// Largest that the kernel lets an Ethernet-like device have.
const MTU_MAX: u32 = 65_535;

/// A bridge as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeSpec {
    /// Its name on this host.
    pub name: InterfaceName,
    /// Largest payload of a frame, in bytes: 68 to 65,535.
    pub mtu: u32,
    /// The interface that leads to other hosts. It may have no addresses of its own: as a bridge's port it could not use
    /// them.
    pub uplink: Option<InterfaceName>,
    /// An address that the host itself has on this network.
    pub gateway: Option<Gateway>,
}

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// The address.
    pub ip: IpAddr,
    /// Up to 32 (IPv4) or 128 (IPv6).
    pub prefix: u8,
}

/// A bridge that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: InterfaceName,
    /// The kernel's number for it.
    pub index: u32,
    /// Bytes.
    pub mtu: u32,
    /// Whether it was made by Godwit; bridges made by others are used but not changed.
    pub ours: bool,
}

/// Why a bridge is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum BridgeError {
    /// The caller may not configure the network.
    #[error("not permitted to configure bridge {bridge}; run the agent as root or with CAP_NET_ADMIN")]
    NotPermitted {
        /// The bridge.
        bridge: InterfaceName,
    },
    /// The frame size is out of range.
    #[error("bridge {bridge} cannot have an MTU of {mtu}; use {MTU_MIN} to {MTU_MAX}")]
    Mtu {
        /// The bridge.
        bridge: InterfaceName,
        /// What was asked.
        mtu: u32,
    },
    /// The prefix is longer than the address.
    #[error("gateway {}/{} of bridge {bridge} has a prefix longer than the address", gateway.ip, gateway.prefix)]
    Prefix {
        /// The bridge.
        bridge: InterfaceName,
        /// What was asked.
        gateway: Gateway,
    },
    /// An interface of that name exists and is no bridge.
    #[error("interface {bridge} exists and is a {kind}, not a bridge; name another bridge or remove it")]
    NameTaken {
        /// The name.
        bridge: InterfaceName,
        /// What it is (`hardware` when the kernel names no kind).
        kind: String,
    },
    /// A bridge that others made is not fit.
    #[error("bridge {bridge} was not made by Godwit, which therefore does not change it, and {what}; {remedy}")]
    Foreign {
        /// The bridge.
        bridge: InterfaceName,
        /// What is missing or wrong.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// The uplink does not exist.
    #[error("uplink {uplink} of bridge {bridge} does not exist; `ip link` lists the interfaces of this host")]
    UplinkMissing {
        /// The bridge.
        bridge: InterfaceName,
        /// The uplink.
        uplink: InterfaceName,
    },
    /// The uplink cannot be used.
    #[error("uplink {uplink} of bridge {bridge} cannot be used: it {what}; {remedy}")]
    UplinkUnfit {
        /// The bridge.
        bridge: InterfaceName,
        /// The uplink.
        uplink: InterfaceName,
        /// Why.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// Ports are still attached.
    #[error("bridge {bridge} still has {ports} VM ports; stop or move their VMs first")]
    Busy {
        /// The bridge.
        bridge: InterfaceName,
        /// How many.
        ports: usize,
    },
    /// A kernel setting could not be written.
    #[error("cannot set {} for bridge {bridge}; is /proc/sys mounted read-only?", path.display())]
    Setting {
        /// The bridge.
        bridge: InterfaceName,
        /// The setting.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel refused for another reason.
    #[error("cannot {step} bridge {bridge}")]
    Kernel {
        /// The bridge.
        bridge: InterfaceName,
        /// What was being done.
        step: &'static str,
        /// Why.
        #[source]
        source: NetlinkError,
    },
}

impl Network {
    /// Makes the bridge exist, up, with this frame size, uplink and gateway: spanning tree off, no forward delay, no
    /// multicast snooping, its MAC pinned (a bridge otherwise takes the lowest of its ports', and the gateway's address
    /// would move with every guest), silent on IPv6 unless the gateway is an IPv6 address. A bridge that others made is
    /// only checked.
    ///
    /// # Errors
    /// [`BridgeError`]; a bridge that this call created is removed again.
    pub fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<Bridge, BridgeError> {
        check_spec(spec)?;
        let netlink = &mut *self.slow();
        let fail = failure(&spec.name, "look for");
        let uplink = find_uplink(netlink, spec)?;
        let found = link::find(netlink, spec.name.as_str()).map_err(fail)?;
        let (bridge, created) = match found {
            Some(link) if link.kind != "bridge" => {
                let kind = if link.kind.is_empty() {
                    "hardware".to_owned()
                } else {
                    link.kind
                };
                return Err(BridgeError::NameTaken {
                    bridge: spec.name.clone(),
                    kind,
                });
            }
            Some(link) if link.alias != BRIDGE_ALIAS => {
                check_foreign(netlink, spec, &link, uplink.as_ref())?;
                return Ok(Bridge {
                    name: spec.name.clone(),
                    index: link.index,
                    mtu: link.mtu,
                    ours: false,
                });
            }
            Some(link) => (link, false),
            None => (create(netlink, spec, uplink.as_ref())?, true),
        };
        match complete(netlink, spec, &bridge, uplink.as_ref(), created) {
            Ok(()) => Ok(Bridge {
                name: spec.name.clone(),
                index: bridge.index,
                mtu: spec.mtu,
                ours: true,
            }),
            Err(error) => {
                if created && let Err(left) = netlink.execute(&[link::delete(bridge.index)]) {
                    tracing::warn!(bridge = %spec.name, error = %left, "a half-made bridge could not be removed");
                }
                Err(error)
            }
        }
    }

    /// Removes a bridge that [`Network::ensure_bridge`] made, freeing its uplink. One that does not exist, or that others
    /// made, is left as it is.
    ///
    /// # Errors
    /// [`BridgeError::Busy`] while VM ports are attached.
    pub fn remove_bridge(&self, name: &InterfaceName) -> Result<(), BridgeError> {
        let netlink = &mut *self.slow();
        let Some(bridge) = link::find(netlink, name.as_str()).map_err(failure(name, "look for"))? else {
            return Ok(());
        };
        if bridge.kind != "bridge" || bridge.alias != BRIDGE_ALIAS {
            return Ok(());
        }
        let links = link::all(netlink).map_err(failure(name, "list the ports of"))?;
        let ports = links
            .iter()
            .filter(|l| l.master == Some(bridge.index) && l.kind == "tun")
            .count();
        if ports > 0 {
            return Err(BridgeError::Busy {
                bridge: name.clone(),
                ports,
            });
        }
        match netlink.execute(&[link::delete(bridge.index)]) {
            Err(error) if error.errno() != Some(Errno::NODEV) => Err(failure(name, "remove")(error)),
            _ => Ok(()),
        }
    }
}

fn check_spec(spec: &BridgeSpec) -> Result<(), BridgeError> {
    if !(MTU_MIN..=MTU_MAX).contains(&spec.mtu) {
        return Err(BridgeError::Mtu {
            bridge: spec.name.clone(),
            mtu: spec.mtu,
        });
    }
    match spec.gateway {
        Some(gateway) if gateway.prefix > if gateway.ip.is_ipv4() { 32 } else { 128 } => Err(BridgeError::Prefix {
            bridge: spec.name.clone(),
            gateway,
        }),
        _ => Ok(()),
    }
}

fn find_uplink(netlink: &mut Netlink, spec: &BridgeSpec) -> Result<Option<Link>, BridgeError> {
    let Some(name) = &spec.uplink else { return Ok(None) };
    let found = link::find(netlink, name.as_str()).map_err(failure(&spec.name, "look for the uplink of"))?;
    let missing = || BridgeError::UplinkMissing {
        bridge: spec.name.clone(),
        uplink: name.clone(),
    };
    found.map(Some).ok_or_else(missing)
}

/// A bridge of others serves if frames pass at once and are large enough, and if it leads where it should.
fn check_foreign(
    netlink: &mut Netlink,
    spec: &BridgeSpec,
    bridge: &Link,
    uplink: Option<&Link>,
) -> Result<(), BridgeError> {
    let name = &spec.name;
    let foreign = |what: String, remedy: String| {
        Err(BridgeError::Foreign {
            bridge: name.clone(),
            what,
            remedy,
        })
    };
    if bridge.spanning_tree == Some(true) {
        return foreign(
            "its spanning tree would hold back a guest for seconds when its port opens".to_owned(),
            format!("run `ip link set {name} type bridge stp_state 0` or name another bridge"),
        );
    }
    if !bridge.is_up() {
        return foreign("it is down".to_owned(), format!("run `ip link set {name} up`"));
    }
    if bridge.mtu < spec.mtu {
        let what = format!("its MTU is {}, less than {}", bridge.mtu, spec.mtu);
        return foreign(
            what,
            format!("run `ip link set {name} mtu {}` or ask for less", spec.mtu),
        );
    }
    if let Some(uplink) = uplink.filter(|uplink| uplink.master != Some(bridge.index)) {
        let what = format!("{} is not one of its ports", uplink.name);
        return foreign(
            what,
            format!("run `ip link set {} master {name}` or name no uplink", uplink.name),
        );
    }
    if let Some(Gateway { ip, prefix }) = spec.gateway {
        let addresses = link::addresses(netlink, bridge.index).map_err(failure(name, "read the addresses of"))?;
        if !addresses.iter().any(|address| address.ip == ip) {
            let what = format!("it does not have the address {ip}");
            return foreign(
                what,
                format!("run `ip address add {ip}/{prefix} dev {name}` or name no gateway"),
            );
        }
    }
    Ok(())
}

/// Creates the bridge, down; refuses first what could not be completed.
fn create(netlink: &mut Netlink, spec: &BridgeSpec, uplink: Option<&Link>) -> Result<Link, BridgeError> {
    if let Some(uplink) = uplink {
        check_uplink(netlink, spec, uplink, None)?;
    }
    let fail = failure(&spec.name, "create");
    // With another frame size at first: only a change tells the kernel not to follow the smallest port's.
    let provisional = if spec.mtu == MTU_MIN { MTU_MIN + 1 } else { spec.mtu - 1 };
    netlink
        .execute(&[link::create_bridge(spec.name.as_str(), provisional)])
        .map_err(&fail)?;
    let vanished = || {
        fail(NetlinkError::Refused {
            errno: Errno::NODEV,
            detail: None,
        })
    };
    link::find(netlink, spec.name.as_str())
        .map_err(&fail)?
        .ok_or_else(vanished)
}

/// Brings a bridge of ours to what was asked; each step is skipped where it holds already.
fn complete(
    netlink: &mut Netlink,
    spec: &BridgeSpec,
    bridge: &Link,
    uplink: Option<&Link>,
    created: bool,
) -> Result<(), BridgeError> {
    let name = &spec.name;
    if created {
        // Setting the MAC it already has is what pins it. The alias cannot be given at creation.
        let mut change = Change::of(bridge.index)
            .alias(BRIDGE_ALIAS)
            .mac(bridge.mac)
            .mtu(spec.mtu);
        if has_ipv6() {
            change = change.no_ipv6_address();
        }
        netlink
            .execute(&[change.message()])
            .map_err(failure(name, "configure"))?;
    } else if bridge.mtu != spec.mtu {
        let change = Change::of(bridge.index).mtu(spec.mtu).message();
        netlink.execute(&[change]).map_err(failure(name, "set the MTU of"))?;
    }
    quiet(spec)?;
    if let Some(uplink) = uplink {
        if uplink.master != Some(bridge.index) {
            check_uplink(netlink, spec, uplink, Some(bridge.index))?;
            let enslave = Change::up(uplink.index).master(bridge.index).message();
            netlink
                .execute(&[enslave])
                .map_err(failure(name, "attach the uplink of"))?;
        } else if !uplink.is_up() {
            let up = Change::up(uplink.index).message();
            netlink
                .execute(&[up])
                .map_err(failure(name, "bring up the uplink of"))?;
        }
    }
    set_gateway(netlink, spec, bridge.index)?;
    if !bridge.is_up() {
        netlink
            .execute(&[Change::up(bridge.index).message()])
            .map_err(failure(name, "bring up"))?;
    }
    Ok(())
}

/// Taking an interface that is in use would cut the host off, or take it from another bridge.
fn check_uplink(
    netlink: &mut Netlink,
    spec: &BridgeSpec,
    uplink: &Link,
    bridge: Option<u32>,
) -> Result<(), BridgeError> {
    let name = &spec.name;
    let unfit = |what: &str, remedy: String| {
        Err(BridgeError::UplinkUnfit {
            bridge: name.clone(),
            uplink: spec.uplink.clone().unwrap_or_else(|| name.clone()),
            what: what.to_owned(),
            remedy,
        })
    };
    let up = &uplink.name;
    if uplink.is_loopback() || uplink.kind == "bridge" {
        return unfit(
            "is the loopback or itself a bridge",
            "name a network card, bond, VLAN or veth".to_owned(),
        );
    }
    if uplink.master.is_some() && uplink.master != bridge {
        return unfit(
            "belongs to another bridge or bond",
            format!("run `ip link set {up} nomaster` first"),
        );
    }
    if uplink.mtu < spec.mtu {
        let remedy = format!(
            "run `ip link set {up} mtu {}` or give the bridge an MTU of {}",
            spec.mtu, uplink.mtu
        );
        return unfit("carries smaller frames than the bridge should", remedy);
    }
    let addresses = link::addresses(netlink, uplink.index).map_err(failure(name, "read the uplink's addresses for"))?;
    if let Some(address) = addresses.first() {
        let has = format!("has the address {}, which would stop answering", address.ip);
        let remedy = format!("make a bridge over {up} that has this address yourself, and name it without an uplink");
        return unfit(&has, remedy);
    }
    Ok(())
}

/// Exactly the gateway asked for; an earlier one goes.
fn set_gateway(netlink: &mut Netlink, spec: &BridgeSpec, index: u32) -> Result<(), BridgeError> {
    let fail = failure(&spec.name, "set the gateway address of");
    let wanted = spec.gateway.map(|gateway| Address {
        ip: gateway.ip,
        prefix: gateway.prefix,
    });
    let present = link::addresses(netlink, index).map_err(&fail)?;
    let stale = present.iter().filter(|address| Some(*address) != wanted.as_ref());
    let mut changes: Vec<_> = stale.map(|address| link::remove_address(index, address)).collect();
    changes.extend(
        wanted
            .iter()
            .filter(|a| !present.contains(a))
            .map(|a| link::add_address(index, a)),
    );
    if changes.is_empty() {
        Ok(())
    } else {
        netlink.execute(&changes).map_err(fail)
    }
}

/// Guests must not configure the host: no IPv6 without an IPv6 gateway, never by their router advertisements; and the
/// host answers ARP here only for addresses it has here.
fn quiet(spec: &BridgeSpec) -> Result<(), BridgeError> {
    let with_ipv6 = spec.gateway.is_some_and(|gateway| gateway.ip.is_ipv6());
    set(spec, "ipv4", "arp_ignore", "1")?;
    set(spec, "ipv6", "accept_ra", "0")?;
    set(spec, "ipv6", "disable_ipv6", if with_ipv6 { "0" } else { "1" })
}

fn set(spec: &BridgeSpec, family: &str, key: &str, value: &str) -> Result<(), BridgeError> {
    let path = PathBuf::from(format!("/proc/sys/net/{family}/conf/{}/{key}", spec.name));
    match fs::read_to_string(&path) {
        Ok(present) if present.trim() == value => return Ok(()),
        // A kernel without that protocol has nothing to quieten.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    fs::write(&path, value).map_err(|source| BridgeError::Setting {
        bridge: spec.name.clone(),
        path,
        source,
    })
}

/// Whether this kernel knows IPv6; one that does not refuses its attributes.
pub(crate) fn has_ipv6() -> bool {
    fs::exists("/proc/sys/net/ipv6").unwrap_or(false)
}

fn failure(bridge: &InterfaceName, step: &'static str) -> impl Fn(NetlinkError) -> BridgeError {
    move |source| match source.errno() {
        Some(Errno::PERM | Errno::ACCESS) => BridgeError::NotPermitted { bridge: bridge.clone() },
        _ => BridgeError::Kernel {
            bridge: bridge.clone(),
            step,
            source,
        },
    }
}
