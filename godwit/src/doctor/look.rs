//! Where is looked, as whom, and what for.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use super::Role;

/// Directories in which programs are, for a user and for root.
const PROGRAM_DIRECTORIES: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];
/// No file of the kernel that is read here is longer; `/proc/net/tcp` of a busy machine is the longest.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// What is asked on the command line.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) roles: Vec<Role>,
    pub(crate) state: Option<PathBuf>,
    pub(crate) pools: Vec<PathBuf>,
    pub(crate) bridge: String,
    pub(crate) uplink: Option<String>,
    pub(crate) mtu: u32,
    pub(crate) qemu: PathBuf,
    pub(crate) ports: Vec<u16>,
    /// How to ask the controller.
    pub(crate) server: crate::client::locate::Flags,
}

/// Which commands mend things here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum System {
    /// Debian, Ubuntu and what derives from them.
    Apt,
    /// Another.
    Other,
}

/// Where things are that depend on how Godwit was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Places {
    pub(crate) agent: Option<PathBuf>,
    pub(crate) controller: Option<PathBuf>,
    pub(crate) pools: Vec<PathBuf>,
}

/// Where is looked, as whom, and what for.
pub(crate) struct Look {
    /// `/`, or in tests a directory that stands for it.
    root: PathBuf,
    pub(crate) is_root: bool,
    pub(crate) system: System,
    /// `x86_64`.
    pub(crate) architecture: String,
    pub(crate) environment: BTreeMap<String, OsString>,
    pub(crate) places: Places,
    pub(crate) roles: Vec<Role>,
    pub(crate) asked: Asked,
    /// QEMU and the controller are asked, namespaces and sockets tried; not in tests of what files say.
    pub(crate) is_real: bool,
}

impl Look {
    /// This machine.
    pub(crate) fn here(asked: Asked) -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
            .collect();
        let machine = rustix::system::uname().machine().to_string_lossy().into_owned();
        let mut look = Self::at("/".into(), asked, environment, machine);
        look.is_root = rustix::process::geteuid().is_root();
        look.is_real = true;
        look
    }

    fn at(root: PathBuf, asked: Asked, environment: BTreeMap<String, OsString>, architecture: String) -> Self {
        let mut look = Self {
            root,
            is_root: true,
            system: System::Other,
            architecture,
            environment,
            places: Places::default(),
            roles: Vec::new(),
            asked,
            is_real: false,
        };
        look.system = look.which_system();
        look.places = look.find_places();
        look.roles = if look.asked.roles.is_empty() {
            look.guess_roles()
        } else {
            look.asked.roles.clone()
        };
        look
    }

    /// The path as it is opened.
    pub(crate) fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Whether something is there; where one may not look, it is not.
    pub(crate) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// A file's text without the white space around it.
    pub(crate) fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        use io::Read as _;
        let mut bytes = Vec::new();
        fs::File::open(self.path(path))?
            .take(FILE_BYTES_MAX)
            .read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// A file that holds one number.
    pub(crate) fn number(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.read(path).ok()?.parse().ok()
    }

    /// The names in a directory, in order; none where it cannot be read.
    pub(crate) fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Where a program is.
    pub(crate) fn program(&self, name: &str) -> Option<PathBuf> {
        let paths = PROGRAM_DIRECTORIES
            .iter()
            .map(|directory| Path::new(directory).join(name));
        paths.into_iter().find(|path| self.path(path).is_file())
    }

    /// A variable that is not empty.
    pub(crate) fn variable(&self, name: &str) -> Option<String> {
        let value = self.environment.get(name)?.to_string_lossy().into_owned();
        Some(value).filter(|value| !value.is_empty())
    }

    /// A command as it is typed: with `sudo` for who is not root.
    pub(crate) fn command(&self, command: &str) -> String {
        if self.is_root {
            command.to_owned()
        } else {
            format!("sudo {command}")
        }
    }

    /// How to install a package of Debian and Ubuntu, or what it is elsewhere.
    pub(crate) fn install(&self, package: &str, words: &str) -> String {
        match self.system {
            System::Apt => self.command(&format!("apt install {package}")),
            System::Other => format!("install {words} with this system's package manager"),
        }
    }

    /// How to set a parameter of the kernel now and at each start.
    pub(crate) fn sysctl(&self, line: &str) -> String {
        let tee = self.command("tee -a /etc/sysctl.d/60-godwit.conf");
        format!("echo '{line}' | {tee} && {}", self.command("sysctl --system"))
    }

    fn which_system(&self) -> System {
        let text = self.read("/etc/os-release").unwrap_or_default();
        let mut ids = text
            .lines()
            .filter_map(|line| line.strip_prefix("ID=").or_else(|| line.strip_prefix("ID_LIKE=")));
        let is_apt = ids.any(|ids| {
            ids.trim_matches('"')
                .split(' ')
                .any(|id| id == "debian" || id == "ubuntu")
        });
        if is_apt { System::Apt } else { System::Other }
    }

    /// `--state` is the directory of `godwit up`, of an agent or of a controller; its files say which.
    fn find_places(&self) -> Places {
        let base = self
            .asked
            .state
            .clone()
            .unwrap_or_else(|| crate::commands::STATE.into());
        let has = |names: &[&str]| names.iter().any(|name| self.exists(base.join(name)));
        let mut places = Places {
            pools: self.asked.pools.clone(),
            ..Places::default()
        };
        if has(&["membership.json", "identity.pem", "journal"]) {
            // An agent that is told no pool has this one.
            if places.pools.is_empty() {
                places.pools.push(Path::new(crate::commands::STATE).join("pool"));
            }
            places.agent = Some(base);
            return places;
        }
        if has(&["client.json", "admin.token", "store"]) {
            places.controller = Some(base);
            return places;
        }
        if places.pools.is_empty() {
            places.pools.push(base.join("pool"));
        }
        places.agent = Some(base.join("agent"));
        places.controller = Some(base.join("controller"));
        places
    }

    fn guess_roles(&self) -> Vec<Role> {
        let is_there = |place: &Option<PathBuf>| place.as_ref().is_some_and(|path| self.exists(path));
        let (agent, controller) = (is_there(&self.places.agent), is_there(&self.places.controller));
        let config = self.variable("XDG_CONFIG_HOME").map(PathBuf::from);
        let config = config.or_else(|| Some(Path::new(&self.variable("HOME")?).join(".config")));
        let client = self.asked.server.server.is_some()
            || self.variable("GODWIT_SERVER").is_some()
            || config.is_some_and(|config| self.exists(config.join("godwit/client.json")));
        if !(agent || controller || client) {
            return Role::ALL.to_vec();
        }
        let found = [
            (Role::Agent, agent),
            (Role::Controller, controller),
            // A controller's machine is where its first administrator works.
            (Role::Client, client || controller),
        ];
        found.into_iter().filter_map(|(role, is)| is.then_some(role)).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A directory that stands for `/`.
    pub(in crate::doctor) struct Fake {
        pub(in crate::doctor) directory: tempfile::TempDir,
        pub(in crate::doctor) asked: Asked,
        pub(in crate::doctor) environment: BTreeMap<String, OsString>,
    }

    pub(in crate::doctor) fn empty() -> Fake {
        Fake {
            directory: tempfile::tempdir().unwrap(),
            asked: Asked {
                roles: Vec::new(),
                state: None,
                pools: Vec::new(),
                bridge: "godwit0".to_owned(),
                uplink: None,
                mtu: 1500,
                qemu: "/nonexistent/qemu".into(),
                ports: vec![7443, 7444],
                server: crate::client::locate::Flags::default(),
            },
            environment: BTreeMap::new(),
        }
        .with("/etc/os-release", "NAME=\"Debian\"\nID=debian\n")
    }

    impl Fake {
        pub(in crate::doctor) fn with(self, path: &str, text: &str) -> Self {
            let at = self.directory.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            fs::write(at, text).unwrap();
            self
        }

        pub(in crate::doctor) fn variable(mut self, name: &str, value: &str) -> Self {
            self.environment.insert(name.to_owned(), value.into());
            self
        }

        pub(in crate::doctor) fn path(&self, path: &str) -> PathBuf {
            self.directory.path().join(path.trim_start_matches('/'))
        }

        pub(in crate::doctor) fn look(&self) -> Look {
            Look::at(
                self.directory.path().to_owned(),
                self.asked.clone(),
                self.environment.clone(),
                "x86_64".to_owned(),
            )
        }
    }

    #[test]
    fn the_role_is_guessed_from_what_is_there() {
        assert_eq!(empty().look().roles, Role::ALL);
        let host = empty().with("/var/lib/godwit/agent/identity.pem", "");
        assert_eq!(host.look().roles, [Role::Agent]);
        let both = host.with("/var/lib/godwit/controller/client.json", "");
        assert_eq!(both.look().roles, Role::ALL);
        let client = empty().variable("HOME", "/home/a");
        let client = client.with("/home/a/.config/godwit/client.json", "{}");
        assert_eq!(client.look().roles, [Role::Client]);
        let mut told = empty();
        told.asked.roles = vec![Role::Controller];
        assert_eq!(told.look().roles, [Role::Controller]);
    }

    #[test]
    fn a_state_directory_is_recognised_by_its_files() {
        let mut fake = empty().with("/s/a/journal", "").with("/s/c/store/x", "");
        let mut places = |state: &str| {
            fake.asked.state = Some(state.into());
            fake.look().places
        };
        assert_eq!(places("/s/a").agent, Some("/s/a".into()));
        assert_eq!(places("/s/a").controller, None);
        assert_eq!(places("/s/c").controller, Some("/s/c".into()));
        let up = places("/s/up");
        assert_eq!(
            (up.agent, up.pools),
            (Some("/s/up/agent".into()), vec!["/s/up/pool".into()])
        );
    }

    #[test]
    fn mends_are_commands_of_this_system_and_this_user() {
        let mut look = empty().look();
        assert_eq!(look.install("nftables", "nftables"), "apt install nftables");
        look.is_root = false;
        assert_eq!(look.install("nftables", "nftables"), "sudo apt install nftables");
        assert_eq!(
            look.sysctl("a.b = 1"),
            "echo 'a.b = 1' | sudo tee -a /etc/sysctl.d/60-godwit.conf && sudo sysctl --system"
        );
        let ubuntu = empty().with("/etc/os-release", "ID=mint\nID_LIKE=\"ubuntu debian\"\n");
        assert_eq!(ubuntu.look().system, System::Apt);
        let other = empty().with("/etc/os-release", "ID=fedora\n").look();
        assert_eq!(
            other.install("nftables", "nftables"),
            "install nftables with this system's package manager"
        );
    }
}
