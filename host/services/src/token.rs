//! Session tokens of the metadata service (IMDSv2): what only a program in the guest gets that can send a PUT and a header.

use std::time::Duration;

use hmac::{Hmac, Mac as _};
use model::VmId;
use sha2::Sha256;

/// Bytes of a [`Key`].
pub const KEY_BYTES: usize = 32;
/// Longest life of a token, seconds.
pub(crate) const TTL_S_MAX: u32 = 21_600;
/// Eight bytes of end, thirty-two of code, as hexadecimal digits.
const TOKEN_BYTES: usize = 80;

/// What tokens are made with. A host makes itself one when its agent starts: a token is worth nothing on another host, and clients
/// get themselves a new one then.
#[derive(Clone)]
pub struct Key([u8; KEY_BYTES]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// A key of random bytes.
    #[must_use]
    pub const fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    fn code(&self, vm: VmId, end_s: u64) -> Hmac<Sha256> {
        let mut code = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        code.update(vm.0.as_bytes());
        code.update(&end_s.to_be_bytes());
        code
    }

    /// A token for a VM that is good for `ttl_s`.
    pub(crate) fn token(&self, vm: VmId, ttl_s: u32, now: Duration) -> String {
        let end_s = now.as_secs().saturating_add(u64::from(ttl_s));
        let code = self.code(vm, end_s).finalize().into_bytes();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        hex(&end_s.to_be_bytes()) + &hex(&code)
    }

    /// Whether a token is this VM's and still good.
    pub(crate) fn admits(&self, vm: VmId, token: &str, now: Duration) -> bool {
        if token.len() != TOKEN_BYTES || !token.bytes().all(|b| b.is_ascii_hexdigit()) {
            return false;
        }
        let (end, code) = token.split_at(16);
        let digits = |at: usize| code.get(at..at + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
        let code: Vec<u8> = (0..64).step_by(2).filter_map(digits).collect();
        let Ok(end_s) = u64::from_str_radix(end, 16) else {
            return false;
        };
        // In time that does not depend on where it differs.
        self.code(vm, end_s).verify_slice(&code).is_ok() && now.as_secs() < end_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn a_token_is_its_vms_for_its_time_and_of_its_host() {
        let (key, other) = (Key::new([1; KEY_BYTES]), Key::new([2; KEY_BYTES]));
        let (vm, neighbour) = (VmId(Uuid::from_u128(1)), VmId(Uuid::from_u128(2)));
        let at = Duration::from_secs;
        let token = key.token(vm, 60, at(100));
        assert!(key.admits(vm, &token, at(159)));
        assert!(!key.admits(vm, &token, at(160)));
        assert!(!key.admits(neighbour, &token, at(100)));
        assert!(!other.admits(vm, &token, at(100)));
        let later = format!("{:016x}{}", 10_000, &token[16..]);
        assert!(!key.admits(vm, &later, at(100)), "its end is signed, too");
        for bad in ["", "x", &"g".repeat(80), &"é".repeat(40)] {
            assert!(!key.admits(vm, bad, at(0)));
        }
    }
}
