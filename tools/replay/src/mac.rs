//! Ethernet addresses as people write them.

/// Not an address of a guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a unicast address like \"52:54:00:c0:10:01\"")]
pub struct MacError {
    text: String,
}

/// Reads six pairs of hexadecimal digits with colons in between.
pub fn parse_mac(text: &str) -> Result<[u8; 6], MacError> {
    let wrong = || MacError {
        text: text.to_owned(),
    };
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let digits = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let part = parts.next().filter(digits).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    let is_unicast = mac[0] & 1 == 0 && mac != [0; 6];
    match parts.next().is_none() && is_unicast {
        true => Ok(mac),
        false => Err(wrong()),
    }
}

/// The usual form.
pub(crate) fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_pairs_of_digits_and_nothing_else() {
        let mac = parse_mac("52:54:00:C0:10:01").unwrap();
        assert_eq!(text(mac), "52:54:00:c0:10:01");
        for wrong in [
            "",
            "52:54:00:c0:10",
            "52:54:00:c0:10:01:02",
            "52:54:00:c0:10:+1",
            "52:54:00:c0:10:1",
            "53:54:00:c0:10:01",
            "00:00:00:00:00:00",
        ] {
            assert!(parse_mac(wrong).is_err(), "{wrong}");
        }
    }
}
