// Strands on a ribbon, cut out by noise.
in vec4 place;  // along, across, a random number of each ribbon, depth
in vec3 diffuse, gleam;
out vec4 colour;
uniform vec3 hair;

void main() {
    float across = (place.y * .5 + .5) * 5., seed = place.z * 97.;
    float strand = hash(vec3(floor(across + seed), floor(seed * 3.), 1.7));
    float waver = hash(vec3(floor(across + seed), floor(seed * 5.), 4.3)) * .7 + .3 * fract(across + seed);
    // Strands end at different lengths, and the sides are thinner.
    if (1.12 - abs(place.y) * .5 - place.x * place.x * .6 < waver * .75) discard;
    vec3 c = hair * (.55 + .6 * strand + .35 * place.z) * mix(.5, 1., smoothstep(0., .35, place.x + .35 * (1. - place.w)));
    colour = vec4(developed(c * diffuse + (hair * .6 + .01) * min(gleam, vec3(.8)) * (.3 + .7 * strand)), 1);
}
