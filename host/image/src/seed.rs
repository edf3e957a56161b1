//! NoCloud seeds: a small read-only disk from which cloud-init learns a VM's name, addresses and keys at its first start.
//!
//! Source: cloud-init's documentation, "NoCloud" and "Networking config Version 2". All text is written as JSON by a
//! serialiser, which is YAML too, so that nothing given can become structure. Keys travel in the meta-data: the user-data is
//! the person's own, byte by byte.

use crate::iso::{self, Member};
use crate::pool::{Pool, PoolError, VOLUMES};
use model::VmId;
use model::addressing::{AddressingMethod, V6_PREFIX_LENGTH};
use model::order::PortUse;
use model::seed::{SSH_KEYS_MAX, USER_DATA_BYTES_MAX, check_key, is_hostname};
use rustix::fs::{Mode, OFlags};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;

/// What a disk has for cloud-init where nothing was given.
const NO_USER_DATA: &[u8] = b"#cloud-config\n{}\n";
/// Longest disk that is read back, bytes.
const DISK_BYTES_MAX: u64 = 1 << 20;
const PORTS_MAX: usize = 16;
const DNS_MAX: usize = 8;
/// The volume's label, by which cloud-init finds it.
const LABEL: &str = "cidata";

/// What a guest is told of itself.
#[derive(Clone)]
pub struct Seed {
    /// Another one makes cloud-init take the guest for a new machine: the VM's id.
    pub instance_id: String,
    /// Its host name.
    pub hostname: String,
    /// Public keys of the people who may log in as the image's user, as in `authorized_keys`, without options.
    pub ssh_keys: Vec<String>,
    /// For cloud-init, as it is; `None` for nothing. A secret: people put passwords here.
    pub user_data: Option<Vec<u8>>,
    /// Its network cards, each found by its hardware address.
    pub ports: Vec<PortUse>,
}

/// What a seed's disk says, as its guest reads it. User-data is a secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SeedFiles {
    /// The guest's host name.
    pub hostname: String,
    /// Public keys of the people who may log in.
    pub ssh_keys: Vec<String>,
    /// For cloud-init, as it was given; `None` for nothing.
    pub user_data: Option<Vec<u8>>,
    /// Its network cards, in cloud-init's version 2.
    pub network_config: Vec<u8>,
}

/// Why there is no seed. User-data is never repeated in a message.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// No name of a host.
    #[error("{0:?} is no host name; use letters, digits, hyphens and dots, at most 63 between dots and 253 in all")]
    Hostname(String),
    /// No id.
    #[error("{0:?} is no instance id; use 1 to 64 letters, digits and hyphens")]
    InstanceId(String),
    /// Not a public key.
    #[error("SSH key {number} {problem}; give one line as in a .pub file")]
    SshKey {
        /// Which, from 1.
        number: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Too much of something.
    #[error("{given} {what} are too many; at most {limit} are possible")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        given: usize,
        /// How many there may be.
        limit: usize,
    },
    /// A prefix beyond 32.
    #[error("/{0} is no prefix of an IPv4 subnet")]
    Prefix(u8),
}

impl Seed {
    /// The seed as an ISO 9660 image with Rock Ridge names: `meta-data`, `user-data`, `network-config`.
    ///
    /// # Errors
    /// See [`SeedError`]: everything is judged before anything is made.
    pub fn iso(&self) -> Result<Vec<u8>, SeedError> {
        self.check()?;
        let user_data = self.user_data.as_deref().unwrap_or(NO_USER_DATA);
        let (meta_data, network_config) = (text(&self.meta_data()), text(&self.network_config()));
        let member = |plain, name, content| Member { plain, name, content };
        Ok(iso::image(
            LABEL,
            &[
                member("META_DAT", "meta-data", &meta_data),
                member("NETWORK_", "network-config", &network_config),
                member("USER_DAT", "user-data", user_data),
            ],
        ))
    }

    fn check(&self) -> Result<(), SeedError> {
        let id_fits = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if !(1..=64).contains(&self.instance_id.len()) || !self.instance_id.chars().all(id_fits) {
            return Err(SeedError::InstanceId(self.instance_id.clone()));
        }
        if !is_hostname(&self.hostname) {
            return Err(SeedError::Hostname(self.hostname.clone()));
        }
        let dns = self
            .ports
            .iter()
            .map(|port| port.addressing.dns.len())
            .max()
            .unwrap_or(0);
        let bytes = self.user_data.as_ref().map_or(0, Vec::len);
        for (what, given, limit) in [
            ("SSH keys", self.ssh_keys.len(), SSH_KEYS_MAX),
            ("bytes of user-data", bytes, USER_DATA_BYTES_MAX),
            ("network cards", self.ports.len(), PORTS_MAX),
            ("name servers", dns, DNS_MAX),
        ] {
            if given > limit {
                return Err(SeedError::TooMany { what, given, limit });
            }
        }
        for (index, key) in self.ssh_keys.iter().enumerate() {
            check_key(key).map_err(|problem| SeedError::SshKey {
                number: index + 1,
                problem,
            })?;
        }
        match self.ports.iter().find(|port| port.prefix > 32) {
            Some(port) => Err(SeedError::Prefix(port.prefix)),
            None => Ok(()),
        }
    }

    fn meta_data(&self) -> Value {
        json!({
            "instance-id": self.instance_id,
            "local-hostname": self.hostname,
            "public-keys": self.ssh_keys,
        })
    }

    fn network_config(&self) -> Value {
        let cards = self.ports.iter().enumerate();
        let cards = cards.map(|(index, port)| (format!("net{index}"), card(port)));
        json!({"version": 2, "ethernets": cards.collect::<Map<String, Value>>()})
    }
}

/// A card as cloud-init's version 2 has it. What a guest asks for by DHCP is not said here.
fn card(port: &PortUse) -> Value {
    let told = &port.addressing;
    let asks = told.method == AddressingMethod::Dhcp;
    let mut card = json!({
        "match": {"macaddress": port.mac.to_string()},
        "dhcp4": asks,
        "dhcp6": false,
        "mtu": port.mtu,
    });
    let (mut addresses, mut routes) = (vec![], vec![]);
    if !asks {
        addresses.push(format!("{}/{}", port.ip, port.prefix));
        // Not `default`: cloud-init of Debian 12 does not know that word.
        routes.extend(port.gateway.map(|via| json!({"to": "0.0.0.0/0", "via": via})));
    }
    if let Some(ip) = port.v6 {
        addresses.push(format!("{ip}/{V6_PREFIX_LENGTH}"));
        let gateway = told.v6.and_then(|prefix| prefix.gateway);
        routes.extend(gateway.map(|via| json!({"to": "::/0", "via": via})));
    }
    if !addresses.is_empty() {
        card["addresses"] = json!(addresses);
    }
    if !routes.is_empty() {
        card["routes"] = json!(routes);
    }
    if !asks && !told.dns.is_empty() {
        card["nameservers"] = json!({"addresses": told.dns});
        if let Some(search) = &told.search {
            card["nameservers"]["search"] = json!([search]);
        }
    }
    card
}

impl SeedFiles {
    /// What an image says; `None` where it is none of ours, or damaged.
    fn of(image: &[u8]) -> Option<Self> {
        let files = iso::files(image);
        let file = |name| files.iter().find(|(of, _)| *of == name).map(|(_, bytes)| *bytes);
        let meta_data: Value = serde_json::from_slice(file("meta-data")?).ok()?;
        let keys = meta_data["public-keys"].as_array()?.iter();
        Some(Self {
            hostname: meta_data["local-hostname"].as_str()?.to_owned(),
            ssh_keys: keys.filter_map(Value::as_str).map(str::to_owned).collect(),
            user_data: Some(file("user-data")?.to_vec()).filter(|data| data != NO_USER_DATA),
            network_config: file("network-config")?.to_vec(),
        })
    }
}

/// Read by our own agents alone: QEMU gets it open.
const SEED_MODE: Mode = Mode::RUSR;

impl Pool {
    /// Opens a VM's seed image for reading; `None` when there is none.
    ///
    /// # Errors
    /// See [`PoolError`]. Whatever lies under its name but a file is refused.
    pub fn open_seed(&self, vm: VmId) -> Result<Option<OwnedFd>, PoolError> {
        let name = format!("{VOLUMES}/{}", seed_name(vm));
        match self.open_beneath(&name, OFlags::RDONLY | OFlags::NONBLOCK) {
            Err(error) if error.source.kind() == ErrorKind::NotFound => Ok(None),
            file => self.regular(&name, file?).map(Some),
        }
    }

    /// What a VM's seed image says; `None` where there is none.
    ///
    /// # Errors
    /// See [`PoolError`]. One that is damaged is refused, without being told.
    pub fn read_seed(&self, vm: VmId) -> Result<Option<SeedFiles>, PoolError> {
        let Some(file) = self.open_seed(vm)? else {
            return Ok(None);
        };
        let fail = |source| PoolError {
            doing: "read",
            path: self.path().join(VOLUMES).join(seed_name(vm)),
            source,
        };
        let mut image = Vec::new();
        let read = File::from(file).take(DISK_BYTES_MAX).read_to_end(&mut image);
        read.map_err(fail)?;
        let damaged = || fail(ErrorKind::InvalidData.into());
        SeedFiles::of(&image).map(Some).ok_or_else(damaged)
    }

    /// Keeps a VM's seed image beside its volumes, durably, at once: nobody sees it half. One that is there is replaced.
    ///
    /// # Errors
    /// See [`PoolError`]. Nothing is left of one that was not kept.
    pub fn keep_seed(&self, vm: VmId, image: &[u8]) -> Result<(), PoolError> {
        let incoming = self.incoming(0)?;
        let written = (&mut incoming.file()).write_all(image);
        written.map_err(|source| PoolError {
            doing: "write",
            path: incoming.path(),
            source,
        })?;
        incoming.keep(VOLUMES, &seed_name(vm), SEED_MODE)
    }

    /// Removes a VM's seed image; false when it was not there.
    ///
    /// # Errors
    /// See [`PoolError`].
    pub fn delete_seed(&self, vm: VmId) -> Result<bool, PoolError> {
        self.delete(VOLUMES, &seed_name(vm))
    }
}

fn seed_name(vm: VmId) -> String {
    format!("{vm}.seed")
}

fn text(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iso::SECTOR;
    use crate::process::Run;
    use model::Mac;
    use model::addressing::{Addressing, V6Prefix};
    use std::time::Duration;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIL0 me: \"here\" #x";

    fn seed() -> Seed {
        Seed {
            instance_id: "0190-ab".into(),
            hostname: "web1.example".into(),
            ssh_keys: vec![KEY.into()],
            user_data: Some(b"#!/bin/sh\necho '\xff: {'\n".to_vec()),
            ports: vec![PortUse {
                policy: model::PortPolicy::default(),
                port: model::PortId(uuid::Uuid::from_u128(1)),
                mac: Mac([0x52, 0x54, 0, 1, 2, 3]),
                ip: [10, 91, 0, 7].into(),
                prefix: 24,
                gateway: Some([10, 91, 0, 1].into()),
                mtu: 1450,
                v6: None,
                addressing: Addressing {
                    dns: vec!["10.91.0.1".parse().unwrap(), "2620:fe::fe".parse().unwrap()],
                    search: Some("a.example".into()),
                    ..Addressing::default()
                },
            }],
        }
    }

    /// util-linux finds the label as the guest's udev does; the files stand at whole sectors, as given.
    #[test]
    fn the_image_has_the_label_the_names_and_the_bytes() {
        let image = seed().iso().unwrap();
        assert_eq!(image.len() % SECTOR, 0);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &image).unwrap();
        let probe = Run::new("blkid", Duration::from_secs(20))
            .args(["-p", "-o", "export"])
            .arg(file.path());
        let probed = String::from_utf8(probe.output().unwrap()).unwrap();
        assert!(
            probed.contains("LABEL=cidata") && probed.contains("TYPE=iso9660"),
            "{probed}"
        );
        let has = |bytes: &[u8]| image.windows(bytes.len()).any(|window| window == bytes);
        assert!(
            ["meta-data", "user-data", "network-config"]
                .iter()
                .all(|name| has(name.as_bytes()))
        );
        let user_data = seed().user_data.unwrap();
        assert!(image.chunks(SECTOR).any(|sector| sector.starts_with(&user_data)));
    }

    #[test]
    fn what_is_given_stays_text() {
        let seed = seed();
        let meta: Value = serde_json::from_slice(&text(&seed.meta_data())).unwrap();
        assert_eq!(meta["public-keys"][0], KEY);
        let network = seed.network_config();
        let card = &network["ethernets"]["net0"];
        assert_eq!(card["match"]["macaddress"], "52:54:00:01:02:03");
        assert_eq!(card["addresses"], json!(["10.91.0.7/24"]));
        assert_eq!(card["routes"], json!([{"to": "0.0.0.0/0", "via": "10.91.0.1"}]));
        assert_eq!(
            card["nameservers"],
            json!({"addresses": ["10.91.0.1", "2620:fe::fe"], "search": ["a.example"]})
        );
        assert_eq!(card["dhcp4"], false);
    }

    #[test]
    fn ipv6_is_said_beside_it_and_what_a_guest_asks_for_is_not_said() {
        let mut seed = seed();
        let prefix = V6Prefix {
            address: "fd00:91::".parse().unwrap(),
            gateway: Some("fe80::1".parse().unwrap()),
        };
        let port = &mut seed.ports[0];
        port.v6 = Some(prefix.address_of(port.mac));
        port.addressing.v6 = Some(prefix);
        let card = |seed: &Seed| seed.network_config()["ethernets"]["net0"].clone();
        let both = card(&seed);
        let v6 = "fd00:91::5054:ff:fe01:203/64";
        assert_eq!(both["addresses"], json!(["10.91.0.7/24", v6]));
        assert_eq!(
            both["routes"],
            json!([{"to": "0.0.0.0/0", "via": "10.91.0.1"}, {"to": "::/0", "via": "fe80::1"}])
        );
        seed.ports[0].addressing.method = AddressingMethod::Dhcp;
        let asks = card(&seed);
        assert_eq!(asks["dhcp4"], true);
        assert_eq!(
            (&asks["addresses"], asks["nameservers"].is_null()),
            (&json!([v6]), true)
        );
    }

    #[test]
    fn bad_names_keys_and_sizes_are_refused_and_user_data_is_not_told() {
        let refused = |change: fn(&mut Seed)| {
            let mut seed = seed();
            change(&mut seed);
            seed.iso().unwrap_err().to_string()
        };
        assert!(refused(|seed| seed.hostname = "a\nruncmd: [x]".into()).contains("no host name"));
        assert!(refused(|seed| seed.instance_id = "a\n".into()).contains("no instance id"));
        assert!(refused(|seed| seed.ssh_keys.push("ssh-rsa AAAA\nssh-rsa AAAA".into())).contains("key 2"));
        assert!(refused(|seed| seed.ssh_keys = vec!["-----BEGIN OPENSSH PRIVATE KEY-----".into()]).contains("private"));
        assert!(refused(|seed| seed.ssh_keys = vec!["command=\"x\" ssh-rsa AAAA".into()]).contains("no kind"));
        assert!(refused(|seed| seed.ssh_keys = vec!["ssh-ed25519 x".into()]).contains("no key"));
        assert!(refused(|seed| seed.ssh_keys = vec![KEY.into(); SSH_KEYS_MAX + 1]).contains("at most 32"));
        assert!(refused(|seed| seed.ports[0].prefix = 33).contains("/33"));
        let told = refused(|seed| seed.user_data = Some(vec![b'x'; USER_DATA_BYTES_MAX + 1]));
        assert!(told.contains("65537 bytes") && !told.contains("xxx"), "{told}");
    }

    #[test]
    fn a_pool_keeps_a_seed_beside_its_volumes_until_it_is_deleted() {
        use std::io::Read as _;
        use std::os::unix::fs::{MetadataExt as _, symlink};

        let directory = tempfile::tempdir().unwrap();
        let pool = Pool::open(directory.path()).unwrap();
        let vm = VmId(uuid::Uuid::from_u128(7));
        assert!(pool.open_seed(vm).unwrap().is_none());
        let image = seed().iso().unwrap();
        pool.keep_seed(vm, &image).unwrap();
        pool.keep_seed(vm, &image).unwrap();
        let path = directory.path().join(VOLUMES).join(format!("{vm}.seed"));
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o400);
        let mut read = Vec::new();
        let mut file = std::fs::File::from(pool.open_seed(vm).unwrap().unwrap());
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, image);
        let said = pool.read_seed(vm).unwrap().unwrap();
        assert_eq!((said.hostname, said.ssh_keys), (seed().hostname, seed().ssh_keys));
        assert_eq!(said.user_data, seed().user_data);
        assert!(serde_json::from_slice::<Value>(&said.network_config).is_ok());
        let nothing = Seed {
            user_data: None,
            ..seed()
        };
        pool.keep_seed(vm, &nothing.iso().unwrap()).unwrap();
        assert_eq!(pool.read_seed(vm).unwrap().unwrap().user_data, None);
        pool.keep_seed(vm, &image[..image.len() - SECTOR]).unwrap();
        assert!(pool.read_seed(vm).is_err());
        assert!(pool.delete_seed(vm).unwrap() && !pool.delete_seed(vm).unwrap());
        assert!(pool.open_seed(vm).unwrap().is_none());
        // Another host of the pool may put anything there.
        symlink("/etc/passwd", &path).unwrap();
        assert!(pool.open_seed(vm).is_err());
    }
}
