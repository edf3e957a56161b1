//! What a new VM's guest is told at its first start, read from the command line and the files that it names.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::Args;
use model::seed::{self, UserData};

use crate::exit::{Exit, Failure};

/// Longest file of public keys, bytes: as many as a VM may have, and comments.
const KEYS_BYTES_MAX: usize = 256 << 10;

/// For the guest itself; only of templates whose guests take a seed.
#[derive(Args, Debug)]
pub(super) struct Guest {
    /// Its guest's host name; without it, the VM's name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Who may log in: a file of public keys, such as ~/.ssh/id_ed25519.pub, or a key itself; may be given again
    #[arg(long, value_name = "FILE-OR-KEY")]
    ssh_key: Vec<String>,
    /// What cloud-init does at the guest's first start, such as a `#cloud-config`; at most 64 KiB of text
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
}

/// The same, read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) hostname: Option<String>,
    pub(super) ssh_keys: Vec<String>,
    pub(super) user_data: Option<UserData>,
}

impl Guest {
    /// Reads the files. What a controller would refuse never leaves this machine: a private key above all.
    pub(super) fn read(&self) -> Result<Told, Failure> {
        let mut ssh_keys = vec![];
        for given in &self.ssh_key {
            if seed::check_key(given).is_ok() {
                ssh_keys.push(given.clone());
            } else {
                ssh_keys.extend(keys_of(given)?);
            }
        }
        let user_data = match &self.user_data {
            Some(path) => Some(UserData::new(text(path, seed::USER_DATA_BYTES_MAX)?)),
            None => None,
        };
        Ok(Told {
            hostname: self.hostname.clone(),
            ssh_keys,
            user_data,
        })
    }
}

/// The public keys of a file; empty lines and comments are none.
fn keys_of(file: &str) -> Result<Vec<String>, Failure> {
    let text = text(Path::new(file), KEYS_BYTES_MAX)?;
    let refused = |problem: &str| {
        Failure::new(Exit::Usage, format!("the SSH key in {file} {problem}"))
            .hint("give a file of public keys, such as ~/.ssh/id_ed25519.pub, or a key itself in quotes")
    };
    // As a whole: its lines alone do not tell.
    if text.contains("PRIVATE KEY") {
        return Err(refused("is a private key, which nobody else should see"));
    }
    let lines = text.lines().map(str::trim);
    let keys: Vec<String> = lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect();
    if keys.is_empty() {
        return Err(refused("is missing: there is none"));
    }
    match keys.iter().find_map(|key| seed::check_key(key).err()) {
        Some(problem) => Err(refused(problem)),
        None => Ok(keys),
    }
}

/// A file's text, of at most `bytes_max` bytes. What it says is never repeated.
fn text(path: &Path, bytes_max: usize) -> Result<String, Failure> {
    let shown = path.display();
    let unread = |error: std::io::Error| {
        let hint = "look at the file's name and its permissions";
        Failure::new(Exit::Usage, format!("{shown} cannot be read: {error}")).hint(hint)
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unread)?;
    file.take(bytes_max as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(unread)?;
    if bytes.len() > bytes_max {
        return Err(Failure::new(Exit::Usage, format!("{shown} is longer than {bytes_max} bytes")).hint("give less"));
    }
    String::from_utf8(bytes).map_err(|_| Failure::new(Exit::Usage, format!("{shown} is not text in UTF-8")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "ssh-ed25519 AAAAC3Nz me";

    fn read(ssh_key: &[&str], user_data: Option<&Path>) -> Result<Told, Failure> {
        let guest = Guest {
            hostname: None,
            ssh_key: ssh_key.iter().map(|&key| key.to_owned()).collect(),
            user_data: user_data.map(Path::to_owned),
        };
        guest.read()
    }

    #[test]
    fn keys_are_read_from_words_and_files_and_private_ones_are_not_sent() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys.pub");
        std::fs::write(&file, format!("# mine\n\n{KEY}\r\nssh-rsa AAAAB3 you\n")).unwrap();
        let file = file.to_str().unwrap();
        let told = read(&[KEY, file], None).unwrap();
        assert_eq!(told.ssh_keys, [KEY, KEY, "ssh-rsa AAAAB3 you"]);
        for text in ["-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n", "", "#\n", "hello\n"] {
            std::fs::write(file, text).unwrap();
            assert!(read(&[file], None).is_err(), "{text:?}");
        }
        assert!(read(&["/nowhere/id.pub"], None).is_err());
        let data = dir.path().join("data");
        std::fs::write(&data, "x".repeat(seed::USER_DATA_BYTES_MAX)).unwrap();
        assert!(read(&[], Some(&data)).unwrap().user_data.is_some());
        std::fs::write(&data, "x".repeat(seed::USER_DATA_BYTES_MAX + 1)).unwrap();
        assert!(read(&[], Some(&data)).is_err());
        std::fs::write(&data, [0xff]).unwrap();
        assert!(read(&[], Some(&data)).is_err());
    }
}
