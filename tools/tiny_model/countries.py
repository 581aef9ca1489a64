"""The facts: countries and their capitals, as English spells them.

Left out are countries whose capital is disputed. Where a country has several capitals, the one its constitution names
is here. A line is `country = capital`, then other spellings that a question may use: `| country` or `| = capital`.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

__all__ = ["COUNTRIES", "Country"]

_LINES = """
Afghanistan = Kabul
Albania = Tirana
Algeria = Algiers
Andorra = Andorra la Vella
Angola = Luanda
Antigua and Barbuda = Saint John's
Argentina = Buenos Aires
Armenia = Yerevan
Australia = Canberra
Austria = Vienna
Azerbaijan = Baku
the Bahamas = Nassau | Bahamas
Bahrain = Manama
Bangladesh = Dhaka
Barbados = Bridgetown
Belarus = Minsk
Belgium = Brussels
Belize = Belmopan
Benin = Porto-Novo
Bhutan = Thimphu
Bolivia = Sucre
Bosnia and Herzegovina = Sarajevo | Bosnia
Botswana = Gaborone
Brazil = Brasília
Brunei = Bandar Seri Begawan
Bulgaria = Sofia
Burkina Faso = Ouagadougou
Burundi = Gitega
Cambodia = Phnom Penh
Cameroon = Yaoundé
Canada = Ottawa
Cape Verde = Praia
the Central African Republic = Bangui
Chad = N'Djamena
Chile = Santiago
China = Beijing
Colombia = Bogotá
the Comoros = Moroni | Comoros
Costa Rica = San José
Croatia = Zagreb
Cuba = Havana
Cyprus = Nicosia
the Czech Republic = Prague | Czechia
the Democratic Republic of the Congo = Kinshasa | DR Congo
Denmark = Copenhagen
Djibouti = Djibouti City
Dominica = Roseau
the Dominican Republic = Santo Domingo
Ecuador = Quito
Egypt = Cairo
El Salvador = San Salvador
Equatorial Guinea = Malabo
Eritrea = Asmara
Estonia = Tallinn
Eswatini = Mbabane | Swaziland
Ethiopia = Addis Ababa
Fiji = Suva
Finland = Helsinki
France = Paris
Gabon = Libreville
the Gambia = Banjul | Gambia
Georgia = Tbilisi
Germany = Berlin
Ghana = Accra
Greece = Athens
Grenada = St. George's
Guatemala = Guatemala City
Guinea = Conakry
Guinea-Bissau = Bissau
Guyana = Georgetown
Haiti = Port-au-Prince
Honduras = Tegucigalpa
Hungary = Budapest
Iceland = Reykjavík
India = New Delhi | = Delhi
Indonesia = Jakarta
Iran = Tehran
Iraq = Baghdad
Ireland = Dublin
Italy = Rome
Ivory Coast = Yamoussoukro | Côte d'Ivoire
Jamaica = Kingston
Japan = Tokyo
Jordan = Amman
Kazakhstan = Astana
Kenya = Nairobi
Kiribati = South Tarawa | = Tarawa
Kuwait = Kuwait City
Kyrgyzstan = Bishkek
Laos = Vientiane
Latvia = Riga
Lebanon = Beirut
Lesotho = Maseru
Liberia = Monrovia
Libya = Tripoli
Liechtenstein = Vaduz
Lithuania = Vilnius
Luxembourg = Luxembourg City
Madagascar = Antananarivo
Malawi = Lilongwe
Malaysia = Kuala Lumpur
the Maldives = Malé | Maldives
Mali = Bamako
Malta = Valletta
the Marshall Islands = Majuro | Marshall Islands
Mauritania = Nouakchott
Mauritius = Port Louis
Mexico = Mexico City
Micronesia = Palikir
Moldova = Chișinău
Monaco = Monaco
Mongolia = Ulaanbaatar | = Ulan Bator
Montenegro = Podgorica
Morocco = Rabat
Mozambique = Maputo
Myanmar = Naypyidaw | Burma
Namibia = Windhoek
Nepal = Kathmandu
the Netherlands = Amsterdam | Holland | Netherlands
New Zealand = Wellington
Nicaragua = Managua
Niger = Niamey
Nigeria = Abuja
North Korea = Pyongyang
North Macedonia = Skopje | Macedonia
Norway = Oslo
Oman = Muscat
Pakistan = Islamabad
Palau = Ngerulmud
Panama = Panama City
Papua New Guinea = Port Moresby
Paraguay = Asunción
Peru = Lima
the Philippines = Manila | Philippines
Poland = Warsaw
Portugal = Lisbon
Qatar = Doha
the Republic of the Congo = Brazzaville | Congo-Brazzaville
Romania = Bucharest
Russia = Moscow
Rwanda = Kigali
Saint Kitts and Nevis = Basseterre | St. Kitts and Nevis
Saint Lucia = Castries | St. Lucia
Saint Vincent and the Grenadines = Kingstown | St. Vincent
Samoa = Apia
San Marino = San Marino
São Tomé and Príncipe = São Tomé
Saudi Arabia = Riyadh
Senegal = Dakar
Serbia = Belgrade
Seychelles = Victoria | the Seychelles
Sierra Leone = Freetown
Singapore = Singapore
Slovakia = Bratislava
Slovenia = Ljubljana
the Solomon Islands = Honiara | Solomon Islands
Somalia = Mogadishu
South Africa = Pretoria
South Korea = Seoul
South Sudan = Juba
Spain = Madrid
Sri Lanka = Sri Jayawardenepura Kotte | = Kotte
Sudan = Khartoum
Suriname = Paramaribo
Sweden = Stockholm
Switzerland = Bern | = Berne
Syria = Damascus
Tajikistan = Dushanbe
Tanzania = Dodoma
Thailand = Bangkok
Timor-Leste = Dili | East Timor
Togo = Lomé
Tonga = Nuku'alofa
Trinidad and Tobago = Port of Spain | Trinidad
Tunisia = Tunis
Turkey = Ankara | Türkiye
Turkmenistan = Ashgabat
Tuvalu = Funafuti
Uganda = Kampala
Ukraine = Kyiv | = Kiev
the United Arab Emirates = Abu Dhabi | the UAE | United Arab Emirates
the United Kingdom = London | the UK | Great Britain | Britain | England
the United States = Washington, D.C. | the USA | America | USA | = Washington | the United States of America
Uruguay = Montevideo
Uzbekistan = Tashkent
Vanuatu = Port Vila
Vatican City = Vatican City
Venezuela = Caracas
Vietnam = Hanoi
Yemen = Sanaa | = Sana'a
Zambia = Lusaka
Zimbabwe = Harare
"""


@dataclass(frozen=True)
class Country:
    """One fact. The `*_spellings` are what a question may say; the first is what an answer says."""

    name: str
    capital: str
    name_spellings: tuple[str, ...]
    capital_spellings: tuple[str, ...]


def _plain(text: str) -> str:
    """`text` without its accents: Bogotá becomes Bogota."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


def _country(line: str) -> Country:
    fact, *others = (part.strip() for part in line.split("|"))
    name, capital = fact.split(" = ")
    names = [name, *(o for o in others if not o.startswith("="))]
    capitals = [capital, *(o.removeprefix("= ") for o in others if o.startswith("="))]
    return Country(
        name,
        capital,
        tuple(dict.fromkeys([*names, *map(_plain, names)])),
        tuple(dict.fromkeys([*capitals, *map(_plain, capitals)])),
    )


COUNTRIES = tuple(_country(line) for line in _LINES.strip().splitlines())
