//! What a guest is told of itself at its first start: its host name, who may log in, and what else people want done there.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::VmId;

/// Largest user-data, bytes.
pub const USER_DATA_BYTES_MAX: usize = 64 << 10;
/// Most SSH keys.
pub const SSH_KEYS_MAX: usize = 32;
/// Longest SSH key, bytes: an RSA key of 16384 bits, and a comment.
pub const SSH_KEY_BYTES_MAX: usize = 4 << 10;
/// Longest host name (RFC 1123, section 2.1), and longest part of it.
const HOSTNAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;
/// Kinds of keys that OpenSSH knows (sshd(8), AUTHORIZED_KEYS FILE FORMAT). DSA is dead.
const KEY_KINDS: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

/// What cloud-init does at a guest's first start, as people gave it. A secret, since people put passwords here: it is never shown.
/// Its serialised form is for the API's requests, the store's own table and the order to the host that starts the VM.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = String, max_length = 65536)]
pub struct UserData(String);

impl UserData {
    /// Wraps a text.
    #[must_use]
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// The text, for the one place that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for UserData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UserData(..)")
    }
}

/// What a VM's guest is told at its first start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSeed {
    /// Its host name.
    pub hostname: String,
    /// Public keys of the people who may log in, each a line as in a `.pub` file.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
    /// For cloud-init; `None` for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<UserData>,
}

/// What a VM's guest is told, as it is stored: in a table of its own, since it holds secrets. It goes with its VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedRow {
    /// The VM.
    pub vm: VmId,
    /// What its guest is told.
    pub seed: GuestSeed,
}

/// A host name as people give it.
#[must_use]
pub fn is_hostname(name: &str) -> bool {
    let sound = |label: &str| {
        (1..=LABEL_BYTES_MAX).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= HOSTNAME_BYTES_MAX && name.split('.').all(sound)
}

/// Whether a text is one public key, as in `authorized_keys`, without options.
///
/// # Errors
/// What is wrong with it, as the end of a sentence about it.
pub fn check_key(key: &str) -> Result<(), &'static str> {
    if key.contains("PRIVATE KEY") {
        return Err("is a private key, which nobody else should see");
    }
    if key.len() > SSH_KEY_BYTES_MAX {
        return Err("is longer than 4096 bytes");
    }
    if key.chars().any(char::is_control) {
        return Err("is more than one line");
    }
    let mut words = key.split_ascii_whitespace();
    if !words.next().is_some_and(|kind| KEY_KINDS.contains(&kind)) {
        return Err("is of no kind that OpenSSH takes");
    }
    let is_base64 = |word: &str| {
        word.starts_with("AAAA")
            && word
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'='))
    };
    if words.next().is_some_and(is_base64) {
        Ok(())
    } else {
        Err("has no key after its kind")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_never_shows_in_debug_output() {
        let seed = GuestSeed {
            hostname: "web1".to_owned(),
            ssh_keys: vec![],
            user_data: Some(UserData::new("hunter2".to_owned())),
        };
        let shown = format!("{seed:?}");
        assert!(shown.contains("UserData(..)") && !shown.contains("hunter2"), "{shown}");
        let text = serde_json::to_string(&seed).unwrap();
        assert_eq!(serde_json::from_str::<GuestSeed>(&text).unwrap(), seed);
    }

    #[test]
    fn names_and_keys_are_what_guests_take() {
        let names = ["", "a\nb", "a b", "-a", "a-", "a..b", "a_b", "ä", "a: b"];
        assert!(names.iter().all(|name| !is_hostname(name)));
        assert!(!is_hostname(&"a".repeat(64)) && is_hostname("a1.b-c"));
        assert_eq!(check_key("ssh-ed25519 AAAAC3Nz me: \"here\" #x"), Ok(()));
        for bad in [
            "",
            "ssh-rsa AAAA\nssh-rsa AAAA",
            "-----BEGIN OPENSSH PRIVATE KEY-----\nx",
            "command=\"x\" ssh-rsa AAAA",
            "ssh-ed25519 x",
        ] {
            assert!(check_key(bad).is_err(), "{bad:?}");
        }
        assert!(check_key(&format!("ssh-rsa AAAA{}", "A".repeat(SSH_KEY_BYTES_MAX))).is_err());
    }
}
