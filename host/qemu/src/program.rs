//! Which QEMU: the installed one, or one unpacked beside it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The machine emulator's name within a system or an unpacked tree.
const NAME: &str = "qemu-system-x86_64";

/// Where a bare name is looked for, whatever the agent's own environment says.
const SEARCHED: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A QEMU program and what it needs around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    path: PathBuf,
    /// Where its firmware lies (`-L`), in the order of search; empty for an installed one, which knows.
    data: Vec<PathBuf>,
    environment: BTreeMap<&'static str, PathBuf>,
}

impl Program {
    /// The program at `path`; a bare name is looked for in `PATH`.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            data: Vec::new(),
            environment: BTreeMap::new(),
        }
    }

    /// The program in a tree of unpacked packages (`dpkg-deb -x`), with its own modules, libraries and firmware; firmware that
    /// the tree lacks is the system's.
    #[must_use]
    pub fn unpacked(root: &Path) -> Self {
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let modules = libraries.join("qemu");
        let mut data = vec![root.join("usr/share/qemu"), root.join("usr/share/seabios")];
        data.push("/usr/share/seabios".into());
        data.retain(|directory| directory.is_dir());
        let environment = BTreeMap::from([("QEMU_MODULE_DIR", modules), ("LD_LIBRARY_PATH", libraries)]);
        Self {
            path: root.join("usr/bin").join(NAME),
            data,
            environment,
        }
    }

    /// The QEMU that `named` names (a program, a directory that holds one, or a tree of unpacked packages); else the installed one. The value comes
    /// from the agent's configuration, or in tests from `GODWIT_QEMU`.
    #[must_use]
    pub fn locate(named: Option<&Path>) -> Self {
        match named {
            Some(directory) if directory.join(NAME).is_file() => Self::at(directory.join(NAME)),
            Some(directory) if directory.is_dir() => Self::unpacked(directory),
            Some(path) => Self::at(path),
            None => Self::at(NAME),
        }
    }

    /// Its path, as given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its file; `None` where a bare name is nowhere.
    #[must_use]
    pub fn file(&self) -> Option<PathBuf> {
        if self.path.components().count() > 1 || self.path.is_absolute() {
            return Some(self.path.clone());
        }
        let mut found = SEARCHED
            .split(':')
            .map(|directory| Path::new(directory).join(&self.path));
        found.find(|path| path.is_file())
    }

    /// The arguments that come before all others.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        self.data
            .iter()
            .flat_map(|directory| ["-L".into(), directory.clone().into_os_string()])
            .collect()
    }

    /// Variables that it needs, beyond those of a clean environment.
    pub(crate) fn environment(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        self.environment.iter().map(|(name, value)| (*name, value.as_path()))
    }

    /// A command with the first arguments and a clean environment: nothing of the agent's own reaches a guest's process.
    pub(crate) fn command(&self) -> std::process::Command {
        let mut command = std::process::Command::new(&self.path);
        command.env_clear().env("PATH", SEARCHED).env("LC_ALL", "C");
        command.envs(self.environment()).args(self.arguments());
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_an_unpacked_qemu_and_all_else_a_program() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("usr/share/qemu")).unwrap();
        let unpacked = Program::locate(Some(root.path()));
        assert_eq!(unpacked.path(), root.path().join("usr/bin/qemu-system-x86_64"));
        assert_eq!(
            unpacked.arguments()[..2],
            ["-L".into(), root.path().join("usr/share/qemu").into_os_string()]
        );
        assert!(unpacked.environment().any(|(name, _)| name == "QEMU_MODULE_DIR"));
        std::fs::write(root.path().join("qemu-system-x86_64"), "").unwrap();
        let wrapped = Program::at(root.path().join("qemu-system-x86_64"));
        assert_eq!(Program::locate(Some(root.path())), wrapped);
        assert_eq!(Program::locate(Some("/opt/q".as_ref())), Program::at("/opt/q"));
        assert!(Program::locate(None).arguments().is_empty());
    }
}
